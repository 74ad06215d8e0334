"""What a stage writes down while it works (`JsonlLog`) and what it shows (`progress`).

Both are for reading only: nothing is decided by the clock or by what stands in a log.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stackllama.errors import RunError
from stackllama.files import readable_size

SECONDS_BETWEEN_LINES = 10.0
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as strings: JSON has no such numbers

Plain = float | int | str | None


class JsonlLog:
    """A file of lines `{"step": 12, "loss": 2.31, ...}`, each on disk (for other processes) once `append` returns.

    Opening one cuts off a torn last line, which a killed process may have left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            whole = path.read_bytes()
            if not whole.endswith(b"\n") and whole:
                os.truncate(path, whole.rfind(b"\n") + 1)

    def append(self, step: int, **values: Plain) -> None:
        """Add one line. Raises RunError if it cannot be written."""
        line = json.dumps({"step": step} | {name: _to_json(value) for name, value in values.items()}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error}. Free some space or check its permissions"
            ) from error

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run is about to write again. Atomic."""
        if not self.path.exists():
            return
        kept = [record for record in read_log(self.path) if record["step"] <= step]
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        unfinished.write_text("", encoding="utf-8")
        copy = JsonlLog(unfinished)
        for record in kept:
            copy.append(**record)
        unfinished.replace(self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Give the lines of a `JsonlLog`, oldest first, without a torn last line.

    Raises RunError, with the line's number, for a line that is no JSON object with a `step`.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            records.append({name: _from_json(value) for name, value in record.items()} | {"step": int(record["step"])})
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged at line {number}: {line[:80]!r}. Delete that line") from error
    return records


class Progress:
    """The state of a display: how much is done, how fast, and the newest named values."""

    def __init__(self, title: str, total: int, unit: str, done: int, clock: Callable[[], float]) -> None:
        self.title, self.total, self.unit, self.done = _printable(title), total, _printable(unit), done
        self._clock = clock
        self._start, self._done_before = clock(), done
        self._values: dict[str, float] = {}
        self._on_change: Callable[[], None] = lambda: None
        self._print: Callable[[str], None] = lambda _: None

    def advance(self, amount_done: int, **values: float) -> None:
        """Count `amount_done` more units; show `values` from now on (a name that is not given keeps its last value)."""
        self.done += amount_done
        self._values = self._values | values  # a new dict, as the display's thread may be reading the old one
        self._on_change()

    def note(self, text: str) -> None:
        """Print a line of its own, above the live display."""
        self._print(_printable(text))

    def counts(self) -> str:
        """Give `320/1,000 questions  12.3 questions/s  0:26, 0:55 left`, or `1.20 MB of 3.34 MB  120 kB/s  ...`."""
        elapsed = self._clock() - self._start
        rate = (self.done - self._done_before) / elapsed if elapsed > 0 else 0.0
        if self.unit == "bytes":
            parts, speed = [f"{readable_size(self.done)} of {readable_size(self.total)}"], readable_size(rate)
        else:
            parts, speed = [f"{self.done:,}/{self.total:,} {self.unit}"], f"{_number(rate)} {self.unit}"
        if rate > 0:
            parts.append(f"{speed}/s")
        left = f", {_duration((self.total - self.done) / rate)} left" if rate > 0 and self.done < self.total else ""
        return "  ".join([*parts, _duration(elapsed) + left])

    def values(self) -> str:
        """Give `loss 2.31  lr 1.4e-05`."""
        return "  ".join(f"{_printable(name)} {_number(value)}" for name, value in self._values.items())

    def line(self) -> str:
        """Give all of it as one line."""
        return "  ".join(part for part in (f"{self.title}:", self.counts(), self.values()) if part)

    def __rich__(self) -> Group:
        row = Table.grid(padding=(0, 1))  # Text throughout: rich would read square brackets in plain strings as markup
        for is_text in (True, False, True):  # in a narrow terminal the bar gives way
            row.add_column(no_wrap=is_text)
        bar = ProgressBar(total=self.total, completed=min(self.done, self.total), width=24)
        row.add_row(Text(self.title, style="bold", no_wrap=True), bar, Text(self.counts(), no_wrap=True))
        values = self.values()
        return Group(row, Text(values, style="dim")) if values else Group(row)


@contextmanager
def progress(
    title: str,
    total: int,
    unit: str,
    done: int = 0,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Show long work: a live display on a terminal, else a plain line at once, every 10 seconds and at the end.

    total and done: units of work in all, and before this process (a resumed run); the rate counts this process only.
    stream: stdout where None. Plain lines also where NO_COLOR is set or TERM is dumb.
    """
    stream = sys.stdout if stream is None else stream
    show = Progress(title, total, unit, done, clock)
    if stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in (None, "", "dumb"):
        with Live(show, console=Console(file=stream), refresh_per_second=4) as live:
            show._print = lambda text: live.console.print(Text(text))
            yield show
    else:
        with _plain_lines(show, stream, clock):
            yield show


@contextmanager
def telling(title: str, unit: str, *, stream: TextIO | None = None) -> Iterator[Callable[[int, int], None]]:
    """`progress` for work that says itself what is done and the total."""
    with progress(title, 1, unit, stream=stream) as show:

        def tell(done: int, total: int) -> None:
            show.total = total
            show.advance(done - show.done)

        yield tell


@contextmanager
def _plain_lines(show: Progress, stream: TextIO, clock: Callable[[], float]) -> Iterator[None]:
    last = clock()
    shown = ""

    def write(text: str) -> None:
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()

    def write_line() -> None:
        nonlocal last, shown
        last, shown = clock(), show.line()
        write(shown)

    def write_if_due() -> None:
        if clock() - last >= SECONDS_BETWEEN_LINES:
            write_line()

    show._on_change, show._print = write_if_due, write
    write_line()
    try:
        yield
    finally:
        if show.line() != shown:
            write_line()


def _number(value: float) -> str:
    if math.isfinite(value) and abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _printable(text: str) -> str:
    """Take out line breaks and terminal control sequences: titles and notes may hold text from a dump."""
    return "".join(character if character.isprintable() else " " for character in text)


def _to_json(value: Plain) -> Plain:
    if isinstance(value, float) and not math.isfinite(value):
        return next(word for word, number in NOT_FINITE.items() if repr(number) == repr(value))
    return value


def _from_json(value: Any) -> Any:
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value
