"""What a build opens, connects to and starts; what it costs; what it leaves behind.

Python tells audit hooks of every file that it opens and of every folder that it changes. Libraries that open files by
themselves (duckdb, pyarrow, libxml2) do not come by there. So the canaries, which stand beside the input and which no
honest build has a reason to touch, are looked at afterwards: their bytes, when they were last read, whose secret word
is in the outcome; and so is the tree of files around them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

SECRET = "canary-7d1f"
_ROW = '<row Id="{0}" CreationDate="2019-05-01T10:00:00.000" Score="{0}" Title="{1}" Body="{1} {0}" {2} />'
_KINDS = {1: 'PostTypeId="1"', 2: 'PostTypeId="2" ParentId="1"', 3: 'PostTypeId="2" ParentId="1"'}
_ROWS = "".join(_ROW.format(number, SECRET, kind) + "\n" for number, kind in _KINDS.items())
CANARIES = {
    "canary.xml": f"<posts>\n{_ROWS}</posts>\n",
    "canary.dtd": f'<!ENTITY e "{SECRET}"><!ATTLIST row Title CDATA "{SECRET}">',
    "canary.jsonl": f'{{"prompt": "{SECRET}", "chosen": "{SECRET} yes", "rejected": "no"}}\n',
}

_PYTHON = tuple(
    os.path.realpath(place)
    for place in {
        *sys.path,
        sys.prefix,
        sys.base_prefix,
        str(Path(__file__).resolve().parents[3]),
        "/proc/self",
        "/proc/meminfo",
        "/proc/stat",
        "/sys",
        "/usr/share/zoneinfo",
    }
)
"""Where modules are imported from, and what libraries read of the machine."""
_STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
_CONNECTS = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.bind",
    "socket.sendto",
    "urllib.Request",
)
_CHANGES = {
    **{f"os.{name}": (0,) for name in ("mkdir", "remove", "rmdir", "chmod", "chown", "utime", "truncate")},
    "os.symlink": (1,),
    "os.rename": (0, 1),
    "os.link": (0, 1),
}
"""Event -> which of its arguments are paths that are changed; the last argument is the folder they start from."""
_LOOKS = ("os.listdir", "os.scandir")


class Watch:
    """Listens, in all threads and while it is entered, to what happens that must not: `found`. `reads` and `writes` are
    the folders in which it may.
    """

    def __init__(self, reads: Iterable[Path], writes: Iterable[Path]) -> None:
        self.found: list[str] = []
        self._writes = tuple(os.path.realpath(one) for one in writes)
        self._reads = (*self._writes, *(os.path.realpath(one) for one in reads), *_PYTHON)

    def __enter__(self) -> Watch:
        _hooked()
        _watches.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _watches.remove(self)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Judge an event of Python's."""
        if event == "open":
            path, mode, flags = arguments
            writing = (isinstance(mode, str) and any(sign in mode for sign in "wax+")) or (
                mode is None and isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            )
            self._judge(event, path, self._writes if writing else self._reads)
        elif event in _CHANGES:
            folder = -1 if event == "os.truncate" else arguments[-1]
            for at in _CHANGES[event]:
                self._judge(event, _placed(arguments[at], folder), self._writes)
        elif event in _LOOKS:
            self._judge(event, arguments[0], self._reads)
        elif event in _STARTS or event in _CONNECTS:
            self.found.append(f"{event} {arguments!r}"[:300])

    def _judge(self, event: str, path: Any, allowed: tuple[str, ...]) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or not os.fspath(path):
            return  # a file that is open already
        real = os.path.realpath(os.fsdecode(path))
        if real != os.devnull and not any(real == place or real.startswith(place + os.sep) for place in allowed):
            self.found.append(f"{event} {real}"[:300])


def _placed(path: Any, folder: Any) -> Any:
    """A path that is meant from an open folder on, as one of its own."""
    if isinstance(folder, int) and folder >= 0 and isinstance(path, str | bytes):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    return path


_watches: list[Watch] = []
_deaf = threading.local()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watches and not getattr(_deaf, "yes", False):
        _deaf.yes = True  # judging asks the system too
        try:
            _watches[-1].hear(event, arguments)
        finally:
            _deaf.yes = False


@cache
def _hooked() -> None:
    sys.addaudithook(_hook)  # which stays for good


class Scene:
    """A folder with the canaries in it, the input (`given`) and the outcome (`out`); `seen` says what changed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.given, self.out = folder, folder / "given", folder / "out"
        self.out.mkdir(parents=True)
        for name, content in CANARIES.items():
            path = folder / name
            path.write_text(content)
            os.utime(path, (1e9, 1.1e9))  # read last before it was written, so that the system notes a read
        self._before = self._tree()

    def remember(self) -> None:
        """What is there now is what there should be afterwards."""
        self._before = self._tree()

    def changed(self) -> list[str]:
        """What is not as it was, beside the outcome."""
        after = self._tree()
        return [
            f"{name} changed"
            for name in sorted(self._before.keys() | after.keys())
            if self._before.get(name) != after.get(name)
        ]

    def _tree(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for place, folders, files in os.walk(self.folder):
            if Path(place) == self.folder and "out" in folders:
                folders.remove("out")
            for name in (*folders, *files):
                path = os.path.join(place, name)
                state = os.lstat(path)
                read = state.st_atime_ns if name in CANARIES and place == str(self.folder) else 0
                size = 0 if name in folders else state.st_size
                found[repr(path)] = (state.st_mode, size, 0 if name in folders else state.st_mtime_ns, read)
        return found


class TooLongError(BaseException):
    """A build was stopped because it took too long; no `except Exception` keeps it."""


@dataclass
class Cost:
    """Seconds of processor time and MB of memory beyond what was there before."""

    seconds: float = 0.0
    megabytes: float = 0.0


@contextmanager
def measuring(limit: float) -> Iterator[Cost]:
    """Measure the block; after `limit` seconds of the clock it is stopped with TooLongError."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"stopped after {limit} s")

    cost, before, started = Cost(), _memory_before(), time.process_time()
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit, 1.0)  # again and again: a handler of errors may be in the way
    try:
        yield cost
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        cost.seconds = time.process_time() - started
        cost.megabytes = max(0.0, _memory("VmHWM") - before)


def _memory_before() -> float:
    """MB in use; from now on the peak begins anew. Where the system does not allow that, the peak so far: then only
    what goes beyond it shows.
    """
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return _memory("VmHWM")
    return _memory("VmRSS")


def _memory(what: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(what))
