"""`stackllama data fetch | stats | show | export`: what there is to do with data beside building them.

Each takes the options of the command line, prints what was asked for, and gives the next command's words.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import yaml

from stackllama.data.building import build
from stackllama.data.download import fetch as fetching
from stackllama.data.download import listing
from stackllama.data.download.remote import Patience
from stackllama.data.interchange import writing as interchange_write
from stackllama.data.pairs import baselines
from stackllama.data.split.assigning import EVAL
from stackllama.data.store import census, picking
from stackllama.data.store.opening import Opened, opened, store_at
from stackllama.data_settings import build_settings
from stackllama.errors import DataError, RecipeError
from stackllama.files import check_writable, readable_size
from stackllama.recipe import PUBLIC_DUMP, Recipe
from stackllama.recipe_load import load_recipe
from stackllama.report import question, tables
from stackllama.run import available_threads
from stackllama.terminal import visible
from stackllama.tokens.template import question_text, root_text
from stackllama.train.metrics import progress, telling

Words = Sequence[str | Path]
PATIENCE = Patience()
SAMPLES = 10
"""Questions that a page shows."""


def fetch(options: Namespace) -> Words:
    """Download the archives of sites; or list what is there."""
    sha256 = (options.sha256 or "").lower()
    if options.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise RecipeError(f"--sha256 {options.sha256!r} is not allowed: it must be 64 hexadecimal digits")
    if not (options.sites or options.list):
        raise RecipeError("no site is named; give one, such as beer.stackexchange.com, or --list")
    address = _address(options)
    place = listing.open_place(address, patience=PATIENCE, note=print)
    if options.list:
        return _list(place, address, options.sites)
    archives = {one.name: one for site in options.sites for one in listing.find(place, site)}
    if sha256 and len(archives) != 1:
        raise RecipeError(f"--sha256 is of one archive, and here are {len(archives)}: {', '.join(archives)}")
    found = []
    for archive in archives.values():
        one = fetching.fetch(archive, Path(options.to), show=progress, patience=PATIENCE, sha256=sha256 or None)
        print(_told(one, archive))
        found.append(one.path)
    return _run_on(found, options.recipe)


def _address(options: Namespace) -> str:
    """Where the archives lie."""
    if options.address is not None and options.recipe is not None:
        raise RecipeError("--address and --recipe both say where the archives lie; give one of them")
    if options.recipe is not None:
        return load_recipe(options.recipe).data.address
    return PUBLIC_DUMP if options.address is None else str(options.address)


def _list(place: listing.Place, address: str, words: Sequence[str]) -> Words:
    """Print the archives whose names have one of the words in them, or all."""
    if not isinstance(place, listing.ListedPlace):
        raise DataError(
            f"{address} has no list of its archives, as items of the Internet Archive have (ITEM_files.xml); name a "
            "SITE, or give another --address"
        )
    archives = [one for name, one in place.archives.items() if not words or any(word in name for word in words)]
    for one in archives:
        print(f"{readable_size(one.size):>10}  {one.name}")
    print(f"{readable_size(sum(one.size for one in archives)):>10}  in {len(archives):,} archives")
    if place.refused:
        print(f"{place.refused:,} are left out: their names or sizes cannot be used")
    return ("data", "fetch", "SITE", *(("--address", address) if address != PUBLIC_DUMP else ()))


def _told(one: fetching.Fetched, archive: listing.Archive) -> str:
    """What there is to say of an archive that is there now."""
    checked = f"size and {' and '.join(one.hashes)} are right" if one.hashes else "its size is right"
    if not archive.hashes:
        checked += "; the address has no hash of it to compare"
    size = readable_size(one.path.stat().st_size)
    return f"{one.path}: {'complete already' if one.was_there else 'downloaded'}, {size}, {checked}"


def _run_on(archives: Sequence[Path], recipe: str | None) -> Words:
    """The command that uses the archives; one of Posts brings those beside it."""
    dumps = [str(path) for path in archives if not re.search("-(?!Posts$)[A-Z][A-Za-z]+$", path.stem)]
    if not dumps:
        return ()
    source = dumps[0] if len(dumps) == 1 else yaml.safe_dump(dumps, default_flow_style=True, width=1 << 20).strip()
    name = "-".join(re.sub(r"(\.stackexchange)?\.(com|net)(-Posts)?$", "", Path(dump).stem) for dump in dumps[:3])
    return ("run", recipe or "smollm2-beer", "--data.source", source, "--name", name[:100])


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
    if EVAL in written.rows:
        print(f"{EVAL} is among the splits: whoever trains on it cannot examine on it; --split leaves it out")
    print(f"{to}: written; ATTRIBUTION.jsonl there names the authors, and has to travel with the data")
    return ()


def _opened(path: str) -> AbstractContextManager[Opened]:
    """The store to look at. What has to be built first is built by the default recipe, even where it breaks off."""
    source = [str(Path(path).absolute())]  # never one of the words that mean something else in a recipe
    recipe = Recipe.model_validate({"name": "look", "data": {"source": source, "allow_truncated": True}})
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


COMMANDS: Mapping[str, Callable[[Namespace], Words]] = {
    "fetch": fetch,
    "stats": stats,
    "show": show,
    "export": export,
}
"""The command line's word after `data` -> what it does."""
