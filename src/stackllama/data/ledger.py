"""The ledger: a Parquet file that remembers the split of every question, for later dumps. Read and written in lots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stackllama.data.splits import LEDGER, SPLITS
from stackllama.errors import DataError
from stackllama.files import atomic_file, check_writable


def open_ledger(path: Path) -> None:
    """Make sure that the ledger at `path` can be read, or is not there yet, and can be written: before any work.

    Raises DataError where the file is no ledger, RunError where it cannot be written.
    """
    for _ in read_ledger(path):
        pass
    check_writable(path, "name another file by data.ledger")


def read_ledger(path: Path) -> Iterator[pa.Table]:
    """The past assignments in lots (site, id, split), none where there is no file. Raises DataError where it is
    something else.
    """
    try:
        if path.is_dir():  # pyarrow would read it as a table of many files
            raise DataError(f"the ledger {path} is a folder; name a file, such as {path / 'ledger.parquet'}")
        if not path.exists():
            return
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1 << 18, columns=LEDGER.names):
                yield _checked(pa.Table.from_batches([batch]).cast(LEDGER), path)
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is no ledger of splits ({error}); restore it from a backup: without it, questions that were held "
            "out could be trained on"
        ) from error


def save_ledger(path: Path, assigned: Sequence[Path], *, folder: Path) -> None:
    """Put the past assignments and those of the Parquet files `assigned` together at `path`, whole or not at all.

    The same assignments give the same bytes. `folder` is for what does not fit in memory. Raises RunError where the
    disk refuses.
    """
    files = [str(file) for file in ([path] if path.exists() else []) + list(assigned)]
    with duckdb.connect(config={"memory_limit": "384MB", "temp_directory": str(folder), "threads": 1}) as database:
        rows = database.sql(
            "select distinct site, id, split from read_parquet($files) order by site, id", params={"files": files}
        )
        with atomic_file(path) as partial, pq.ParquetWriter(partial, LEDGER, compression="zstd") as writer:
            for batch in rows.to_arrow_reader(1 << 17):
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=LEDGER))


def _checked(table: pa.Table, path: Path) -> pa.Table:
    unknown = sorted(set(pc.unique(table["split"]).to_pylist()) - set(SPLITS))
    if unknown:
        raise DataError(f"{path} has unknown splits: {', '.join(unknown)}; the splits are {', '.join(SPLITS)}")
    return table
