"""`stackllama data fetch | stats | show | export`: what there is to do with data beside building them.

Each takes the options of the command line, prints what was asked for, and gives the next command's words.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stackllama.data import interchange_write, store
from stackllama.errors import DataError
from stackllama.tokens.template import question_text, root_text

Words = Sequence[str | Path]


def export(options: Namespace) -> Words:
    """Write preference data in a format of other tools."""
    folder, to = _store(Path(options.path)), Path(options.to)
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


def _store(path: Path) -> Path:
    """The folder of preference data at `path`, or in the run there."""
    for folder in (path, path / "data"):
        if (folder / store.MANIFEST).is_file():
            return folder
    raise DataError(f"{path} holds no preference data; give a run whose data were built, or a folder of such data")


COMMANDS: Mapping[str, Callable[[Namespace], Words]] = {"export": export}
