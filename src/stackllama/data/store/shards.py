"""The shards of a store, and queries of duckdb over them in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb

from stackllama.data.building.keys import MEMORY
from stackllama.data.store import store
from stackllama.errors import DataError
from stackllama.files import raise_if_full

_NAMES = re.compile(r"\$(\w+)")

Ask = Callable[..., list[dict[str, Any]]]
"""A query, and values for its $names -> the rows, by column. $files in it are the shards."""


def question_shards(folder: Path) -> tuple[dict[str, Mapping[str, int]], dict[str, str]]:
    """(split -> its counts, path of a shard -> its split) of the questions of a store.

    Raises DataError where there is no store or none that holds a question (as that of plain documents), and where a
    shard is missing or has not the size that it was written with.
    """
    splits: dict[str, Mapping[str, int]] = {}
    shards: dict[str, str] = {}
    for key, part in sorted(store.read_manifest(folder).parts.items()):
        kind, _, split = key.partition("/")
        if kind != "questions":
            continue
        splits[split] = part.counts
        for shard in part.shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise DataError(f"the shard {path} is not the one in the manifest; build the data again")
            shards[str(path)] = split
    if not any(counts["questions"] for counts in splits.values()):
        raise DataError(f"{folder} holds no question, so there is nothing to look at; give data that have some")
    return splits, shards


@contextmanager
def queries(shards: Iterable[str], preparation: str = "") -> Iterator[Ask]:
    """Yield a function that answers queries over the shards; `preparation` is done before the first one.

    The function raises DataError where a shard cannot be read, RunError where the disk is full.
    """
    files = list(shards)
    with (
        TemporaryDirectory() as spill,
        duckdb.connect(config={"memory_limit": MEMORY, "temp_directory": spill}) as database,
    ):

        def ask(query: str, **values: Any) -> list[dict[str, Any]]:
            try:
                given = {"files": files, **values}
                found = database.execute(query, {name: given[name] for name in _NAMES.findall(query)})
                names = [column[0] for column in found.description]
                return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
            except duckdb.Error as error:
                raise_if_full(error, Path(spill))
                raise DataError(f"the data cannot be read ({error}); build them again") from error

        if preparation:
            database.execute(preparation)
        yield ask
