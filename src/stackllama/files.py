"""Writing so that a kill or a full disk leaves the old file or the new one, never half of one; and hashes of files.

Everything is written beside its place under a temporary name, flushed to the disk and renamed. A temporary that a
killed process left behind is removed by the next write of the same thing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stackllama.errors import RunError, StackllamaError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = ".tmp-"


def atomic_write_text(path: Path, text: str) -> None:
    """Put `text` (UTF-8) at `path`. Errors: RunError where the disk is full or refuses."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def atomic_write_json(path: Path, value: Any) -> None:
    """Put `value` at `path` as indented JSON, keys in their order; NaN and infinity raise ValueError."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving it takes the place of `path`, with an exception it is removed.

    A folder that stood at `path` is replaced as a whole. Errors: RunError where the disk is full or refuses.
    """
    with _replacing(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a name to write a file under; on leaving it takes the place of `path`, with an exception it is removed.

    Errors: RunError where the disk is full or refuses.
    """
    with _replacing(path) as temporary:
        yield temporary


def check_writable(path: Path, otherwise: str) -> None:
    """Make sure that a file can be written at `path`, and leave the disk as it was.

    Errors: RunError where it cannot be; its last words are `otherwise`.
    """
    try:
        if path.is_dir():  # of a name too long, too, the system says so
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        there = next(parent for parent in path.absolute().parents if parent.exists())
        _probe(there / f".{path.name}{_TEMPORARY}{os.getpid()}")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}; {otherwise}") from error


def take_lock(path: Path, what: Path, otherwise: str) -> int:
    """A descriptor that holds the lock at `path`; the system lets go of it when the process ends, however it ends.

    Who holds it may remove `path`. Errors: RunError where another process holds it, which is then said of `what`, or
    where it cannot be had; the last words are `otherwise`.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise_if_full(error, path)
            raise RunError(f"{path} cannot be opened: {error.strerror}; {otherwise}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise RunError(f"{path} cannot be locked ({error.strerror}): no local disk?; {otherwise}") from error
            raise RunError(
                f"{what} is in use by another process ({owner or 'unknown'}); wait for it, or {otherwise}"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:  # else: its owner removed it in between
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """The JSON at `path`. Errors: RunError where it is missing or broken."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is not JSON ({error}); delete the folder it stands in and run the stage again"
        ) from error


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_folder(path: Path) -> str:
    """SHA-256 over the names and contents of all files below `path`, in the order of their names."""
    files = sorted((file.relative_to(path).as_posix(), digest_file(file)) for file in path.rglob("*") if file.is_file())
    return digest_json(files)


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # names of files need not be UTF-8


def readable_size(size: float) -> str:
    """Bytes for reading: `512 bytes`, `3.34 MB`, `20.6 GB`."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 99.95 else f"{size:#.3g} {unit}"


def is_temporary(path: Path) -> bool:
    """Whether a file or folder is one that an unfinished write left behind."""
    return path.name.startswith(".") and _TEMPORARY in path.name


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what stands there on leaving is flushed and renamed to `path`."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        _probe(temporary)
    except OSError as error:
        raise_if_full(error, path)
        raise RunError(f"{path} cannot be written: {error.strerror}; choose another folder") from error
    try:
        yield temporary
        _flush(temporary)
        _swap(temporary, path)
    except BaseException as error:
        _remove(temporary)
        raise_if_full(error, path)
        raise


def _probe(path: Path) -> None:
    """Make a file and remove it again. Raises OSError where the place, or the name, does not allow it."""
    path.touch()
    path.unlink()


def raise_if_full(error: BaseException, path: Path, *, left: str = "nothing half-written is left") -> None:
    """Raise RunError where `error` says that the disk is full or refuses to be written, else do nothing.

    left: what is on the disk now, in the words of the message. Libraries wrap the operating system's error in their
    own, so its words are looked for too.
    """
    if isinstance(error, StackllamaError):
        return
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or os.strerror(errno.ENOSPC) in str(error):
        raise RunError(
            f"the disk that holds {path.parent} is full, so {path.name} was not written; {left}. "
            "Free some space and give the same command again"
        ) from error
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        raise RunError(f"{path} cannot be written: {os.strerror(number)}; choose another folder") from error


def _flush(path: Path) -> None:
    """Ask the operating system to put a file, or all of a folder, on the disk."""
    below = [path, *path.rglob("*")] if path.is_dir() else [path]
    for item in below:
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(temporary: Path, path: Path) -> None:
    if path.is_dir() and temporary.is_dir():
        old = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}-old")
        path.rename(old)  # a folder cannot be renamed over another one; a kill right here leaves none at `path`
        temporary.rename(path)
        _remove(old)
    else:
        temporary.replace(path)
    _flush_entry(path.parent)


def _flush_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove temporaries of `path` whose process is gone."""
    prefix = f".{path.name}{_TEMPORARY}"
    for leftover in [item for item in path.parent.iterdir() if item.name.startswith(prefix)]:
        process = leftover.name.removeprefix(prefix).partition("-")[0]
        if process == str(os.getpid()) or not (process.isdigit() and _alive(int(process))):
            _remove(leftover)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # it may never have been written; the first error is the one to tell
            path.unlink()
