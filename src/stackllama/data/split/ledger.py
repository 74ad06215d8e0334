"""The ledger: a Parquet file that remembers the split of every question, for later dumps. Read and written in lots."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stackllama.data.split.assigning import LEDGER, SPLITS
from stackllama.errors import DataError
from stackllama.files import atomic_file, check_writable, take_lock

_ANOTHER = "name another file by data.ledger"


def open_ledger(path: Path) -> None:
    """Make sure that the ledger at `path` can be read, or is not there yet, and can be written: before any work.

    Raises DataError where the file is no ledger, RunError where it cannot be written.
    """
    for _ in read_ledger(path):
        pass
    check_writable(path, _ANOTHER)


@contextmanager
def locked_ledger(path: Path) -> Iterator[None]:
    """Keep the ledger at `path` to this build, from what is read until what is saved: of two builds at a time, one
    would not know what the other assigned, and its save would undo it.

    Raises RunError where another build has it. Leaves no file behind unless it is killed.
    """
    path = path.resolve()  # one file has one lock, by whatever name it goes
    beside = path.with_name(f".{path.name}.lock")
    lock = take_lock(beside, path, _ANOTHER)
    try:
        yield
    finally:
        beside.unlink(missing_ok=True)
        os.close(lock)


def read_ledger(path: Path) -> Iterator[pa.Table]:
    """The past assignments in lots (site, id, split), none where there is no file. Raises DataError where it is
    something else, or has a question in two splits.
    """
    try:
        if path.is_dir():  # pyarrow would read it as a table of many files
            raise DataError(f"the ledger {path} is a folder; name a file, such as {path / 'ledger.parquet'}")
        if not path.exists():
            return
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(1 << 18, columns=LEDGER.names)
            yield from _checked((pa.Table.from_batches([batch]).cast(LEDGER) for batch in batches), path)
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is no ledger of splits ({error}); restore it from a backup: without it, questions that were held "
            "out could be trained on"
        ) from error


def save_ledger(path: Path, assigned: Sequence[Path], *, folder: Path) -> None:
    """Put the past assignments and those of the Parquet files `assigned` together at `path`, whole or not at all.

    The same assignments give the same bytes. `folder` is for what does not fit in memory. Raises DataError where a
    question would be in two splits, RunError where the disk refuses.
    """
    files = [str(file) for file in ([path] if path.exists() else []) + list(assigned)]
    with duckdb.connect(config={"memory_limit": "384MB", "temp_directory": str(folder), "threads": 1}) as database:
        rows = database.sql(
            "select distinct site, id, split from read_parquet($files) order by site, id", params={"files": files}
        )
        with atomic_file(path) as partial, pq.ParquetWriter(partial, LEDGER, compression="zstd") as writer:
            batches = (pa.Table.from_arrays(batch.columns, schema=LEDGER) for batch in rows.to_arrow_reader(1 << 17))
            for lot in _checked(batches, path):
                writer.write_table(lot)


def _checked(lots: Iterable[pa.Table], path: Path) -> Iterator[pa.Table]:
    """The lots of a ledger as they are. Raises DataError where a split is unknown, or where rows that follow each other
    (as `save_ledger` sorts them, all rows of a question do) put one question into two.
    """
    last = LEDGER.empty_table()
    for lot in lots:
        unknown = sorted(set(pc.unique(lot["split"]).to_pylist()) - set(SPLITS))
        if unknown:
            raise DataError(f"{path} has unknown splits: {', '.join(unknown)}; the splits are {', '.join(SPLITS)}")
        rows = pa.concat_tables([last, lot])
        before, after = rows.slice(0, max(0, len(rows) - 1)), rows.slice(1)
        same = pc.and_(pc.equal(before["site"], after["site"]), pc.equal(before["id"], after["id"]))
        torn = before.filter(pc.and_(same, pc.not_equal(before["split"], after["split"])))
        if torn.num_rows:
            site, number = (torn[name][0].as_py() for name in ("site", "id"))
            raise DataError(
                f"question {number} of {site} is in two splits by the ledger {path}, so what is held out could be "
                "trained on; restore it from a backup"
            )
        yield lot
        last = rows.slice(max(0, len(rows) - 1))
