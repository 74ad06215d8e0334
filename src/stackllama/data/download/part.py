"""A file on its way: what has come of it, and of which file it is, so that another process can go on with it.

beer.stackexchange.com.7z.part        what has come so far
beer.stackexchange.com.7z.part.json   of which file: address, size, hashes, validator
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from stackllama.data.download.listing import Archive
from stackllama.errors import RunError
from stackllama.files import atomic_write_json, read_json

ENDING = ".part"


@dataclass(frozen=True, slots=True)
class Origin:
    """The file that a part is of. See Archive; `hashes` are those of the list."""

    url: str
    size: int
    hashes: Mapping[str, str]
    validator: str | None

    def is_of(self, archive: Archive) -> bool:
        """Whether this is the archive as it is now, as far as can be told before asking for it."""
        same = (self.url, self.size, self.hashes) == (archive.url, archive.size, archive.hashes)
        return same and (archive.listed or self.validator == archive.validator)

    @property
    def can_be_told(self) -> bool:
        """Whether going on could never join two files unseen."""
        return bool(self.hashes or self.validator)


class Part:
    """How much of which file has come? Made by `open_part`, which locks it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._note = path.with_name(f"{path.name}.json")
        self.origin = self._read_note()
        self.size = os.fstat(descriptor).st_size
        if self.origin is None or self.size > self.origin.size:
            self.discard()

    def begin(self, origin: Origin) -> None:
        """Forget what has come; what comes now is of `origin`."""
        self.discard()
        atomic_write_json(self._note, asdict(origin))
        self.origin = origin

    def append(self, piece: bytes) -> None:
        """Put `piece` behind what has come."""
        written = 0
        while written < len(piece):
            written += os.pwrite(self._descriptor, memoryview(piece)[written:], self.size + written)
        self.size += written

    def discard(self) -> None:
        """Forget all of it."""
        os.ftruncate(self._descriptor, 0)
        self._note.unlink(missing_ok=True)
        self.size, self.origin = 0, None

    def finish(self, target: Path) -> None:
        """Give it its name."""
        os.fsync(self._descriptor)
        self.path.replace(target)
        self._note.unlink(missing_ok=True)

    def _read_note(self) -> Origin | None:
        try:
            origin = Origin(**read_json(self._note))
        except (RunError, TypeError):  # none, or none that was written by this
            return None
        return origin if isinstance(origin.size, int) else None


@contextmanager
def open_part(target: Path) -> Iterator[Part]:
    """What has come of the file that is to be `target`; leaves nothing behind where nothing has come.

    Raises RunError where another process is at it, OSError where the disk refuses.
    """
    path = target.with_name(f"{target.name}{ENDING}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{path} is being written by another process; wait for it, or give another --to") from error
        part = Part(path, descriptor)
        try:
            yield part
        finally:
            if not part.size:
                part.discard()
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
