"""How a table is cut into pieces that can be read apart from each other.

A row begins with `<row`, and a `<` inside an attribute is always escaped. So a piece reaches from the first row that
begins at or behind a multiple of the piece's size to the first one at or behind the next multiple. Where the cuts lie
depends on the bytes and the size alone, not on who reads them or how many do it.

A file is cut by seeking: its pieces carry no bytes, whoever reads one opens the file. A member of an archive streams by
once: its pieces carry their bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stackllama.data.dump.archive import Tables, opened
from stackllama.data.dump.rows import LONGEST, ByteStream, Place
from stackllama.data.interchange import reading as interchange_read
from stackllama.errors import DataError, DumpError

RECORDS = "Records"
SMALLEST, USUAL, MOST = 1 << 20, 1 << 24, 1 << 10
"""Bytes of a piece at least, and usually; and how many pieces there may be before they grow beyond that."""

_ROW = re.compile(rb"<row[\s/>]")
_STEP = 1 << 20
_TOKEN = len(b"<row ")


@dataclass(frozen=True, slots=True)
class Source:
    """A dump, or preference data of another tool: its number among those of a build, where it is, and the address of
    its site (of preference data, empty: each question names its own).
    """

    number: int
    path: str
    site: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `stop` of a table; `data` has them unless they are read from `file`.

    Of preference data the table is `RECORDS`, and `records` says what to read.
    """

    source: Source
    table: str
    number: int
    start: int
    stop: int
    last: bool
    file: Path | None = None
    data: bytes | None = None
    records: interchange_read.Piece | None = None

    @property
    def name(self) -> str:
        """Unlike that of any other piece of the same dumps."""
        return f"{self.source.number:04}-{self.table.lower()}-{self.number:06}"

    @property
    def place(self) -> Place:
        """Where in the table it lies, as `dump.rows` wants to know."""
        return Place(self.start, self.last)

    @contextmanager
    def open(self) -> Iterator[ByteStream]:
        """Its bytes, to be read in the block. Raises DumpError where the file cannot be opened any more."""
        if self.data is not None:
            yield io.BytesIO(self.data)
            return
        assert self.file is not None
        with opened(self.file) as file:
            file.seek(self.start)
            yield _Range(file, self.stop - self.start)


def piece_size(total: int) -> int:
    """Bytes of a piece of dumps that have `total` bytes together: of a small one there are 8 pieces, of a large one a
    multiple of 8 (which a usual number of workers divides, so that none is left with the last one), and of a huge one
    `MOST`.
    """
    count = min(MOST, 8 * -(-total // (8 * USUAL)))
    return max(SMALLEST, -(-total // max(1, count)))


def cut_records(source: Source) -> Iterator[Piece]:
    """The pieces of preference data. Raises DataError where there are none, or none that can be read."""
    usual = interchange_read.PIECE_BYTES
    found = interchange_read.pieces(source.path, piece_bytes=usual)
    if not found:
        raise DataError(f"{source.path} has no rows; give preference data, or the dump of a question-and-answer site")
    for number, one in enumerate(found):
        size = one.last - one.first if one.path.endswith(".jsonl") else usual // interchange_read.SPREAD
        start = number * usual
        yield Piece(source, RECORDS, number, start, start + size, last=True, records=one)


def cut(source: Source, tables: Tables, names: Sequence[str], size: int) -> Iterator[Piece]:
    """The pieces of the named tables that are there, one table after the other."""
    for table, stream in tables.streams(names):
        file = tables.file(table)
        if file is None:
            for number, (start, data, last) in enumerate(_cut_stream(stream, f"{source.path}: {table}.xml", size)):
                yield Piece(source, table, number, start, start + len(data), last, data=data)
        else:
            for number, (start, stop, last) in enumerate(_cut_file(file, size)):
                yield Piece(source, table, number, start, stop, last, file=file.absolute())


def _cut_file(path: Path, size: int) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether it is the last) of each piece of a file."""
    with opened(path) as file:
        end = file.seek(0, io.SEEK_END)
        start, goal = 0, size
        while True:
            stop = _next_row(file, goal, end, str(path))
            yield start, stop, stop == end
            if stop == end:
                return
            start, goal = stop, (stop // size + 1) * size


def _next_row(file: BinaryIO, goal: int, end: int, name: str) -> int:
    """Where the first row at or behind `goal` begins; `end` where there is none."""
    if goal >= end:
        return end
    file.seek(goal)
    held, at = b"", goal
    while piece := file.read(_STEP):
        held += piece
        if found := _ROW.search(held):
            return at + found.start()
        at += max(0, len(held) - _TOKEN)
        held = held[-_TOKEN:]
        _refuse_endless(at - goal, goal, name)
    return end


def _cut_stream(stream: ByteStream, name: str, size: int) -> Iterator[tuple[int, bytes, bool]]:
    """(start, bytes, whether it is the last) of each piece of a stream."""
    start, goal, held, searched = 0, size, bytearray(), 0
    while chunk := stream.read(_STEP):
        held += chunk
        while start + len(held) > goal:
            found = _ROW.search(held, max(goal - start, searched))
            if found is None:
                searched = max(0, len(held) - _TOKEN)
                _refuse_endless(start + len(held) - goal, goal, name)
                break
            yield start, bytes(held[: found.start()]), False
            start += found.start()
            del held[: found.start()]
            goal, searched = (start // size + 1) * size, 0
    yield start, bytes(held), True


def _refuse_endless(size: int, goal: int, name: str) -> None:
    if size > LONGEST:
        raise DumpError(f"{name} has no row in {LONGEST} bytes after byte {goal}; it is no table of a dump")


class _Range:
    """Part of a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        piece = self._file.read(min(size, self._left))
        self._left -= len(piece)
        return piece
