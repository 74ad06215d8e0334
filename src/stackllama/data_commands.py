"""`stackllama data fetch | stats | show | export`: what there is to do with data beside building them.

Each takes the options of the command line, prints what was asked for, and gives the next command's words.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from stackllama.data import baselines, build, census, interchange_write, picking
from stackllama.data.opening import Opened, opened, store_at
from stackllama.data_settings import build_settings
from stackllama.errors import DataError
from stackllama.files import check_writable
from stackllama.recipe import Recipe
from stackllama.report import question, tables
from stackllama.run import available_threads
from stackllama.terminal import visible
from stackllama.tokens.template import question_text, root_text
from stackllama.train.metrics import telling

Words = Sequence[str | Path]

SAMPLES = 10
"""Questions that a page shows."""


def stats(options: Namespace) -> Words:
    """Count what data hold: as tables, as JSON, as a page."""
    page = Path(options.page) if options.page else None
    if page is not None:
        check_writable(page, "give --page another file")
    with _opened(options.path) as data:
        counted = census.take(data.folder)
        picked = picking.sample(data.folder, SAMPLES, options.seed)
        if page is not None:
            from stackllama.report.data_page import write_page  # brings matplotlib

            write_page(page, data, counted, picked, seed=options.seed)
        if options.json:
            told = {"path": data.path, "kind": data.kind, "rebuilt": data.rebuilt, **census.to_json(counted)}
            print(json.dumps({**told, "build": data.report}, indent=2))
        elif page is None:
            _print(_stats(data, counted))
    if page is not None:
        print(f"{page}: written", file=sys.stderr)
    if not picked:
        return ()
    first = picked[0].question
    return ("data", "show", options.path, "--question", str(first.id), "--site", first.site)


def show(options: Namespace) -> Words:
    """Print one question with its answers and pairs."""
    with _opened(options.path) as data:
        _print(question.lines(picking.find(data.folder, options.question, options.site)))
    return ("data", "stats", options.path)


def export(options: Namespace) -> Words:
    """Write preference data in a format of other tools."""
    folder, to = store_at(options.path), Path(options.to)
    if folder is None:
        raise DataError(
            f"{options.path} holds no preference data; give a run whose data were built, or a folder of such data"
        )
    titles = not options.no_titles

    def render(title: str, body: str) -> str:
        return root_text(question_text(title if titles else "", body))

    written = interchange_write.write(
        folder, to, format=options.format, splits=options.split, render=render, fixed_order=options.fixed_order
    )
    for split, rows in written.rows.items():
        print(f"{split}: {rows:,} rows")
    for what, count in written.counts.items():
        print(f"{what}: {count:,}")
    print(f"{to}: written; ATTRIBUTION.jsonl there names the authors, and has to travel with the data")
    return ()


def _opened(path: str) -> AbstractContextManager[Opened]:
    """The store to look at. What has to be built first is built by the default recipe, even where it breaks off."""
    recipe = Recipe.model_validate({"name": "look", "data": {"source": [path], "allow_truncated": True}})
    machine = build.Machine(available_threads())
    return opened(path, build_settings(recipe), machine, partial(telling, stream=sys.stderr))


def _stats(data: Opened, counted: census.Census) -> Iterable[str]:
    shown = [tables.overview(data, counted), tables.splits(counted)]
    shown += [tables.sites(counted)] if len(counted.sites) > 1 else []
    shown += [tables.quantiles(counted), tables.content(counted), tables.tags(counted)]
    shown += [*tables.left_out(data.report, counted), tables.remarks(data.report)]
    for table in filter(lambda table: table.rows, shown):
        yield from (*tables.lines(table), "")
    yield "Baselines: mean over questions of the mean over pairs, ± standard error"
    for line in baselines.table(tables.baseline_rows(data.report, counted)):
        yield f"  {line}"
    for note in (tables.LENGTH, *tables.notes(data, counted)):
        yield from ("", note)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(visible(line))


COMMANDS: Mapping[str, Callable[[Namespace], Words]] = {"stats": stats, "show": show, "export": export}
"""The command line's word after `data` -> what it does."""
