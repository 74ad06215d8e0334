"""The tables in a .7z archive, which is never unpacked to disk.

An archive is decompressed in a thread of its own through a bounded pipe, once for all wanted tables, in the order in
which it stores them; so memory stays flat, and decompressing and parsing share two cores. What it claims is checked
before a byte is decompressed: names that lead outside, passwords, sizes that only a decompression bomb has, and methods
that unpack without a bound. py7zr never writes more of a member than the archive claims for it.
"""

from __future__ import annotations

import io
import queue
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import py7zr
from py7zr.archiveinfo import HeaderStreamsInfo
from py7zr.io import Py7zIO, WriterFactory
from py7zr.properties import MAGIC_7Z

from stackllama.data.dump.rows import ByteStream
from stackllama.errors import DumpError

MAX_RATIO = 250
"""Text packs 5 to 30 times smaller. Archives that claim more than this, and more than `SMALL`, are refused."""
SMALL = 1 << 25
LARGEST_LISTING = 1 << 18
"""Bytes of an archive's table of contents: a dump has 8 tables, and some 500 bytes. Each member costs py7zr memory."""
METHODS = {
    b"\0": "copy",
    b"\x21": "LZMA2",
    b"\x03\x01\x01": "LZMA",
    b"\x04\x02\x02": "BZip2",
    b"\x03\x03\x01\x03": "BCJ",
}
"""Id -> name of each method that is read: those of dumps, as far as they unpack in steps of a bounded size and without
harm. What Deflate and Zstandard give is taken all at once, so 64 KB may become gigabytes; on damaged PPMd the library
for it (pyppmd 1.3) takes the interpreter down.
"""
_PIECE = 1 << 18
_PIECES_IN_PIPE = 16


def check_archive(path: Path) -> None:
    """Make sure that the file is a whole .7z: its table of contents stands at its end. Raises DumpError if not."""
    with path.open("rb") as file, _opened(path, file):
        pass


class ArchiveTables:
    """Tables in a .7z archive."""

    def __init__(self, path: Path, site: str, *, wanted: str) -> None:
        self.site = site
        self._path = path
        with path.open("rb") as file, _opened(path, file) as archive:
            # lower-case name of the table -> (name in the archive, bytes), in stored order
            self._members = _checked_members(path, archive, wanted)

    def files(self, names: Sequence[str]) -> list[Path]:
        """The archive, where it holds one of the named tables."""
        return [self._path] if any(name.lower() in self._members for name in names) else []

    def file(self, name: str) -> Path | None:  # noqa: ARG002 - as the protocol has it
        """None: they stream."""
        return None

    def size(self, names: Sequence[str]) -> int:
        """Bytes of the named tables, decompressed."""
        return sum(self._members[name.lower()][1] for name in names if name.lower() in self._members)

    def streams(self, names: Sequence[str]) -> Iterator[tuple[str, ByteStream]]:
        """The named tables, one after the other."""
        asked = {name.lower(): name for name in names}
        wanted = {stored: (asked[key], size) for key, (stored, size) in self._members.items() if key in asked}
        pipe = _Pipe()
        # The file, not its name, goes in: py7zr then uses one thread, and members come in stored order.
        with self._path.open("rb") as file, _opened(self._path, file) as archive:
            targets = [stored for stored, (_, size) in wanted.items() if size]
            work = threading.Thread(
                target=_decompress, args=(archive, targets, pipe), name="stackllama-7z", daemon=True
            )
            work.start()
            try:
                for stored, (name, size) in wanted.items():
                    stream = _PipeReader(pipe, self._path, stored) if size else io.BytesIO()
                    yield name, stream
                    while stream.read(_PIECE):  # to the end: the checksum comes after the last byte
                        pass
            finally:
                pipe.abandoned.set()
                pipe.drain()
                file.close()  # ends at once a thread that is busy with a table which nobody wants
                work.join()


def _opened(path: Path, file: BinaryIO) -> py7zr.SevenZipFile:
    with _told(path):
        _check_listing(path, file)
        file.seek(0)
        return py7zr.SevenZipFile(file, "r")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tells what py7zr makes of bad bytes, which are errors of many modules (its own, struct, lzma, EOFError, ...)."""
    try:
        yield
    except DumpError:
        raise
    except Exception as error:
        raise DumpError(
            f"{path} cannot be read as a .7z archive ({type(error).__name__}: {error}); it is cut off or damaged: a "
            ".7z has its table of contents at its end, so get it again"
        ) from error


def _check_listing(path: Path, file: BinaryIO) -> None:
    """Make sure that the table of contents is a small one, before py7zr takes it into memory."""
    head = file.read(32)
    start, size = struct.unpack("<QQ", head[12:28])
    if not head.startswith(MAGIC_7Z) or start + size > path.stat().st_size:
        return  # py7zr says that it is no archive, or not all of one
    sizes = [size]
    file.seek(start + len(head))
    if size <= LARGEST_LISTING and (listing := io.BytesIO(file.read(size))).read(1) == _PACKED:
        folders = HeaderStreamsInfo.retrieve(listing).unpackinfo.folders
        _check_methods(path, folders)
        sizes += [unpacked for folder in folders for unpacked in folder.unpacksizes]
    if max(sizes) > LARGEST_LISTING:
        raise DumpError(
            f"{path} has a table of contents of {max(sizes)} bytes, and {LARGEST_LISTING} are allowed: a dump has 8 "
            "tables; give the archive of one site's dump"
        )


_PACKED = b"\x17"
"""How a table of contents begins that is packed itself."""


def _check_methods(path: Path, folders: Sequence[Any]) -> None:
    """Make sure that no block of the archive is packed by a method that unpacks all at once."""
    for method in (coder["method"] for folder in folders for coder in folder.coders):
        if method not in METHODS:
            raise DumpError(
                f"{path} is packed by the method {method.hex()} of 7z, and those that are read are "
                f"{', '.join(METHODS.values())}; unpack it yourself and give the folder"
            )


def _decompress(archive: py7zr.SevenZipFile, targets: list[str], pipe: _Pipe) -> None:
    """Work of the thread: the wanted members into the pipe, an error too."""
    with suppress(_AbandonedError):
        try:
            if targets:
                archive.extract(targets=targets, factory=_PipeFactory(pipe))
            # Who still waits for a member then waits for one that py7zr passed over: no plain file, say.
            pipe.put(EOFError("the archive ends before it"))
        except _AbandonedError:
            raise
        except BaseException as error:
            pipe.put(error)


def _checked_members(path: Path, archive: py7zr.SevenZipFile, wanted: str) -> dict[str, tuple[str, int]]:
    """The tables that the archive claims to have; raises DumpError on a claim that no dump makes."""
    if archive.needs_password():
        raise DumpError(f"{path} asks for a password; dumps have none")
    with _told(path):
        streams = archive.header.main_streams
        _check_methods(path, streams.unpackinfo.folders if streams else ())
        entries = [(str(one.filename), int(one.uncompressed), one.is_directory) for one in archive.list()]
    members: dict[str, tuple[str, int]] = {}
    for name, size, is_folder in entries:
        inside = PurePosixPath(name.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or ":" in name:
            raise DumpError(f"{path} holds {name[:200]!r}, a name that leads outside the archive; it is refused")
        if size < 0:
            raise DumpError(f"{path} claims {size} bytes for {name[:200]!r}; it is damaged, get it again")
        if inside.suffix.lower() == ".xml" and not is_folder:
            if inside.stem.lower() in members:
                raise DumpError(
                    f"{path} holds {inside.name} more than once; give an archive with the tables of one site"
                )
            members[inside.stem.lower()] = (name, size)
    claimed, packed = sum(size for _, size, _ in entries), path.stat().st_size
    if claimed > SMALL and claimed > MAX_RATIO * packed:
        raise DumpError(
            f"{path} claims {claimed} bytes in {packed} packed ones, over {MAX_RATIO} to 1: a decompression bomb; if "
            "you trust it, unpack it yourself and give the folder"
        )
    if wanted.lower() not in members:
        found = ", ".join(name[:60] for name, _, _ in entries[:8]) or "nothing"
        raise DumpError(f"{path} has no {wanted}.xml (it has {found}); give the archive of one site's dump")
    return members


class _AbandonedError(Exception):
    """The reader of the pipe is gone; ends the thread that decompresses."""


class _Pipe:
    """Pieces of decompressed bytes between two threads; `None` ends a member, an error ends all."""

    def __init__(self) -> None:
        self.abandoned = threading.Event()
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(_PIECES_IN_PIPE)

    def put(self, item: bytes | BaseException | None) -> None:
        while not self.abandoned.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue
        raise _AbandonedError

    def get(self) -> bytes | BaseException | None:
        return self._queue.get()

    def drain(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return


class _PipeReader:
    """One member of the archive, read off the pipe."""

    def __init__(self, pipe: _Pipe, path: Path, stored: str) -> None:
        self._pipe = pipe
        self._path = path
        self._stored = stored
        self._rest = b""
        self._ended = False

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end of the member."""
        if not self._rest and not self._ended:
            item = self._pipe.get()
            if isinstance(item, bytes):
                self._rest = item
            elif item is None:
                self._ended = True
            else:
                self._ended = True
                raise DumpError(
                    f"{self._path} is damaged: {self._stored} does not decompress "
                    f"({type(item).__name__}: {item}); get the archive again"
                ) from item
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


class _PipeFactory(WriterFactory):
    """What py7zr asks for a place to write a member to."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe

    def create(self, filename: str) -> Py7zIO:  # noqa: ARG002 - the interface of py7zr
        return _PipeWriter(self._pipe)


class _PipeWriter(Py7zIO):
    """Where py7zr writes a member to. `close` is called only when the member is complete and its checksum right."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._size = 0

    def write(self, s: bytes | bytearray) -> int:
        view = memoryview(s)
        for start in range(0, len(view), _PIECE):
            self._pipe.put(bytes(view[start : start + _PIECE]))
        self._size += len(view)
        return len(view)

    def close(self) -> None:
        self._pipe.put(None)

    def seekable(self) -> bool:
        return False

    def read(self, size: int | None = None) -> bytes:  # noqa: ARG002
        raise io.UnsupportedOperation("a pipe is written only")

    def seek(self, offset: int, whence: int = 0) -> int:  # noqa: ARG002
        raise io.UnsupportedOperation("a pipe does not seek")

    def flush(self) -> None:
        return

    def size(self) -> int:
        return self._size
