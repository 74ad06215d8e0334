"""What there is to look at behind a path: a run, preference data of ours or of another tool, or a dump.

All come out as a store. What is none yet is built into a temporary folder first, the way a run does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stackllama.data.building import build
from stackllama.data.dump.archive import MAGIC
from stackllama.data.interchange import reading as interchange_read
from stackllama.data.pairs.baselines import is_row
from stackllama.data.store import store
from stackllama.errors import DataError
from stackllama.files import read_json

ALLOWED = (
    "a run (its folder or name), a folder of preference data, preference data of another tool (.parquet, .jsonl, a "
    "folder of them, or hub:OWNER/NAME), or a dump (Posts.xml, a folder with it, or a .7z archive)"
)
RUN, STORE, DUMP = "run", "preference data", "dump"
RECIPE, REPORT = "recipe.yaml", "report.json"

Report = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Opened:
    """A store to look at. `kind` says what stands at `path`; `report` has what its build counted (`build.build`), and
    is empty where nobody kept that; `rebuilt` says that the store was made only to be looked at.
    """

    path: str
    kind: str
    folder: Path
    report: Report
    rebuilt: bool


def store_at(where: str, runs: Path = Path("runs")) -> Path | None:
    """The folder of the store that is there: it, or that of the run which is there or has that name; else None.

    Raises DataError for an empty name, which a path would take for the working directory.
    """
    if not where:
        raise DataError(f"an empty name is given; give {ALLOWED}")
    path = Path(where)
    try:
        inside = (path, path / "data") if path.exists() else (runs / path / "data",)
        return next((folder for folder in inside if (folder / store.MANIFEST).is_file()), None)
    except OSError:  # a name too long, a folder that may not be looked into
        return None


@contextmanager
def opened(where: str, settings: build.Settings, machine: build.Machine, show: build.Show) -> Iterator[Opened]:
    """Yield the store of what is at `where`; the rest is for what has to be built first.

    Raises DataError where there is nothing that can be looked at, and what `build.build` raises.
    """
    folder = store_at(where)
    if folder is not None:
        kind = RUN if folder.name == "data" and (folder.parent / RECIPE).is_file() else STORE
        yield Opened(where, kind, folder, _report(folder / REPORT), rebuilt=False)
        return
    kind = _kind(where)
    with TemporaryDirectory(prefix="stackllama-") as temporary:
        made = Path(temporary) / "data"
        counts = build.build(
            build.sources([where]),
            made,
            settings,
            machine,
            ledger=made / "ledger.parquet",
            fingerprint=None,
            show=show,
        )
        yield Opened(where, kind, made, counts, rebuilt=True)


def _kind(where: str) -> str:
    """What can be built there."""
    if interchange_read.is_records(where):
        formats = sorted({piece.format for piece in interchange_read.pieces(where)})
        return f"{STORE} of another tool ({', '.join(formats)})"
    path = Path(where)
    try:
        if path.is_file() and _begins_like_a_dump(path):
            return DUMP
        if not path.exists():
            raise DataError(f"{where} is not there; give {ALLOWED}")
        if path.is_dir() and any(item.name.lower() == "posts.xml" for item in path.iterdir()):
            return DUMP
        if (path / RECIPE).is_file():
            raise DataError(f"{where} is a run whose data were not built yet; first type: stackllama data {where}")
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}; give {ALLOWED}") from error
    raise DataError(f"{where} is nothing that can be looked at; give {ALLOWED}")


def _begins_like_a_dump(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"<", MAGIC))


def _report(path: Path) -> Report:
    """What the build of a store counted. Raises DataError for a file that no build has written."""
    if not path.is_file():
        return {}
    report = read_json(path)
    if not (isinstance(report, dict) and all(fits(report[name]) for name, fits in _PARTS.items() if name in report)):
        raise DataError(f"{path} is not what a build writes; delete it, or build the data again")
    return report


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(type(count) is int for count in value.values())


_PARTS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("dropped", "pairs_dropped", "notes", "clusters"), _are_counts),
    "truncated": lambda value: isinstance(value, dict) and all(map(_are_counts, value.values())),
    "baselines": lambda value: isinstance(value, list) and all(map(is_row, value)),
}
"""What is told of a report, and what each part has to be."""
