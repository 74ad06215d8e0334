"""Where the tables of a dump are: in a folder, in one file, or in a .7z archive that is never unpacked to disk.

    with open_tables(path) as tables:
        for name, stream in tables.streams(["Posts", "Users"]):
            ...

Archives (`seven_zip.py`) and folders come from strangers: what is no plain file (a named pipe would be waited for
without end) and what is a link that leads out of its folder is not opened.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from stackllama.data.dump.rows import ByteStream
from stackllama.errors import DumpError
from stackllama.files import digest_file, digest_json

TABLES = ("Posts", "Users", "Votes", "PostLinks")
"""What is read of a dump."""

MAGIC = b"7z\xbc\xaf\x27\x1c"


class Tables(Protocol):
    """The tables of one site. `site` is the name that the folder or archive suggests."""

    site: str

    def files(self, names: Sequence[str]) -> list[Path]:
        """The files that hold those of the named tables that are there."""

    def file(self, name: str) -> Path | None:
        """The file that is the named table; None where the table streams out of an archive."""

    def size(self, names: Sequence[str]) -> int:
        """Bytes of those of the named tables that are there, decompressed."""

    def streams(self, names: Sequence[str]) -> Iterator[tuple[str, ByteStream]]:
        """Each named table that is there, once; a stream is good until the next one is asked for."""


@contextmanager
def open_tables(path: Path) -> Iterator[Tables]:
    """The tables behind `path`: `Posts.xml`, a folder of tables, or a .7z.

    `SITE-Posts.7z` (how the largest site is shipped) brings `SITE-Users.7z`, `SITE-Votes.7z` and `SITE-PostLinks.7z`
    from beside it. Raises DumpError where
    there is nothing to read, no table Posts, or an archive that is damaged, encrypted or hostile.
    """
    path = Path(path)
    try:
        tables = _found(path)
    except OSError as error:
        raise DumpError(_unreadable(path, error)) from error
    yield tables


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading its bytes. Raises DumpError where that is refused."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DumpError(_unreadable(path, error)) from error
    with file:
        yield file


def digest_dump(path: Path) -> str:
    """SHA-256 over the names and contents of the files that are read of the dump at `path`, and of no others.

    Raises DumpError where one cannot be read, and where `open_tables` does.
    """
    with open_tables(path) as tables:
        return digest_json(sorted((file.name, _digest(file)) for file in tables.files(TABLES)))


def _digest(file: Path) -> str:
    try:
        return digest_file(file)
    except OSError as error:
        raise DumpError(_unreadable(file, error)) from error


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read: {error.strerror or error}; give a dump that can be read"


def _found(path: Path) -> Tables:
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        what = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise DumpError(f"{path} {what}; give Posts.xml, a folder of tables, or a .7z archive of a dump")
    if path.suffix.lower() == ".7z" or _begins_with(path, MAGIC):
        return _archives(path)
    return _single(path)


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _folder(path: Path) -> FileTables:
    files = _tables_in(path)
    if "posts" not in files:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise DumpError(
            f"the folder {path} has no Posts.xml (it has {found}); give a folder with the tables of one site"
        )
    return FileTables(_site(path.resolve().name), files)


def _single(path: Path) -> FileTables:
    if path.suffix.lower() in (".zst", ".gz", ".zip", ".bz2", ".xz", ".tar"):
        raise DumpError(f"{path} is packed as {path.suffix}; give Posts.xml, a folder of tables, or a .7z archive")
    if path.name.lower() == "posts.xml":
        return FileTables(_site(path.resolve().parent.name), _tables_in(path.parent, given=path) | {"posts": path})
    return FileTables(_site(path.stem), {"posts": path})


def _site(name: str) -> str:
    """The name of a folder or archive as that of a site: text, which what a disk calls its files need not be."""
    return name.encode("utf-8", "replace").decode()


def _tables_in(folder: Path, given: Path | None = None) -> dict[str, Path]:
    """Lower-case name of each table -> its file in the folder. Raises DumpError for one that is none to be opened; what
    was `given` by its own name is not judged.
    """
    tables = {name.lower() for name in TABLES}
    found = {
        file.stem.lower(): file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() == ".xml" and file.stem.lower() in tables
    }
    for file in found.values():
        if file != given:
            check_plain(file, folder)
    return found


def check_plain(file: Path, folder: Path) -> None:
    """Make sure that what was found in a folder is a file of that folder. Raises DumpError where it is something else,
    such as a pipe, or a link that leads out of it.
    """
    if not file.is_file():
        what = os.strerror(errno.EISDIR) if file.is_dir() else "it is no file that can be opened"
        raise DumpError(f"{file} cannot be read: {what}; give a dump that can be read")
    if not (real := file.resolve()).is_relative_to(folder.resolve()):
        raise DumpError(
            f"{file} is a link that leads out of its folder, to {real}; put the file itself there, or name it alone"
        )


def _archives(path: Path) -> Tables:
    from stackllama.data.dump.seven_zip import ArchiveTables  # 30 ms that only an archive is worth, for every worker

    site = _site(path.stem.removesuffix("-Posts").removesuffix("-posts"))
    tables = ArchiveTables(path, site, wanted="Posts")
    if path.stem.lower().endswith("-posts"):
        names = {name: f"{path.stem[: -len('-posts')]}-{name}{path.suffix}" for name in TABLES[1:]}
        beside = {name: path.with_name(file) for name, file in names.items() if os.path.lexists(path.with_name(file))}
        for file in beside.values():
            check_plain(file, path.parent)
        parts = [ArchiveTables(file, site, wanted=name) for name, file in beside.items()]
        return PairedTables(site, (tables, *parts)) if parts else tables
    return tables


class FileTables:
    """Tables that are files."""

    def __init__(self, site: str, files: dict[str, Path]) -> None:
        self.site = site
        self._files = files  # lower-case name of the table -> file

    def files(self, names: Sequence[str]) -> list[Path]:
        """The file of each named table."""
        return [self._files[name.lower()] for name in names if name.lower() in self._files]

    def file(self, name: str) -> Path | None:
        """The file of the named table."""
        return self._files.get(name.lower())

    def size(self, names: Sequence[str]) -> int:
        """Bytes of the named tables, decompressed."""
        return sum(file.stat().st_size for file in self.files(names))

    def streams(self, names: Sequence[str]) -> Iterator[tuple[str, ByteStream]]:
        """The named tables, one after the other."""
        for name in names:
            if name.lower() in self._files:
                with opened(self._files[name.lower()]) as file:
                    yield name, file


class PairedTables:
    """Tables that are spread over several archives."""

    def __init__(self, site: str, parts: Sequence[Tables]) -> None:
        self.site = site
        self._parts = parts

    def files(self, names: Sequence[str]) -> list[Path]:
        """The archives that hold the named tables."""
        return [file for part in self._parts for file in part.files(names)]

    def file(self, name: str) -> Path | None:  # noqa: ARG002 - as the protocol has it
        """None: they stream."""
        return None

    def size(self, names: Sequence[str]) -> int:
        """Bytes of the named tables, decompressed."""
        return sum(part.size(names) for part in self._parts)

    def streams(self, names: Sequence[str]) -> Iterator[tuple[str, ByteStream]]:
        """The named tables, one after the other."""
        for part in self._parts:
            yield from part.streams(names)
