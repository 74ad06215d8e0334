"""Metrics beside the log, for tools that draw them while training goes on: TensorBoard, Weights & Biases, trackio.

What decides and what is reported comes from `metrics.jsonl` alone; a tracker is for looking. Each takes numbers only.
After a kill a stage writes some steps again: TensorBoard is told to forget those it had; Weights & Biases and trackio
are told nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from stackllama.errors import RecipeError
from stackllama.train.metrics import Plain

TENSORBOARD = FOLDER = "tensorboard"
PROJECT = "stackllama"
SECONDS = 5
"""Between two writes of event files; what a killed process had not written is in the log alone."""
EXTRA = "trackers"


class Log(Protocol):
    """What takes a stage's metrics, step by step."""

    def append(self, step: int, **values: Plain) -> None:
        """Add the values of a step."""

    def truncate_after(self, step: int) -> None:
        """Forget what was added of later steps, which are about to come again."""


class Together:
    """Several logs as one; the first is the one that counts."""

    def __init__(self, logs: Sequence[Log]) -> None:
        self._logs = tuple(logs)

    def append(self, step: int, **values: Plain) -> None:
        """Add the values of a step to each."""
        for log in self._logs:
            log.append(step, **values)

    def truncate_after(self, step: int) -> None:
        """Have each forget what came after a step."""
        for log in self._logs:
            log.truncate_after(step)


class TensorBoard:
    """Event files in a folder, which `tensorboard --logdir` draws; names are written as given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def append(self, step: int, **values: Plain) -> None:
        """Add the numbers of a step; they are on disk after a few seconds."""
        if self._writer is None:
            self._writer = self._begin(None)
        for name, value in _numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def truncate_after(self, step: int) -> None:
        """Have the steps after this one purged, where there are event files already."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._begin(step + 1) if self._files() else None

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()

    def _begin(self, purged_from: int | None) -> SummaryWriter:
        # Files are named by the second, so that two of one second would be one.
        suffix = f".{self._files()}"
        folder = str(self._folder)
        return SummaryWriter(folder, purge_step=purged_from, flush_secs=SECONDS, filename_suffix=suffix)

    def _files(self) -> int:
        return len(list(self._folder.iterdir())) if self._folder.is_dir() else 0


class Hosted:
    """A run of a tracker that counts its steps and never goes back: Weights & Biases, trackio."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._run: Any = None

    def append(self, step: int, **values: Plain) -> None:
        """Add the numbers of a step."""
        if self._run is None:
            self._run = self._start()
        self._run.log(_numbers(values), step=step)

    def truncate_after(self, step: int) -> None:
        """Nothing is taken back."""

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()


@contextmanager
def tracked(log: Log, names: Sequence[str], run_folder: Path, stage: str) -> Iterator[Log]:
    """The log of a stage with trackers beside it, which are closed behind the block."""
    trackers = [_tracker(name, run_folder.resolve(), stage) for name in names]
    try:
        yield Together([log, *trackers])
    finally:
        for one in trackers:
            one.close()


def check_installed(names: Sequence[str]) -> None:
    """Raise RecipeError where a tracker needs a package that is not installed."""
    for name in names:
        if name != TENSORBOARD and find_spec(name) is None:
            raise RecipeError(
                f"track names {name}, which is not installed; type: pip install 'stackllama[{EXTRA}]', or leave it out"
            )


def _tracker(name: str, run: Path, stage: str) -> TensorBoard | Hosted:
    if name == TENSORBOARD:
        return TensorBoard(run / FOLDER / stage)
    title = f"{run.name}/{stage}"
    return Hosted(lambda: _wandb(title, run, stage) if name == "wandb" else _trackio(title, run))


def _wandb(title: str, run: Path, stage: str) -> Any:
    import wandb

    identity = hashlib.blake2b(f"{run}/{stage}".encode(), digest_size=8).hexdigest()
    return wandb.init(project=PROJECT, name=title, group=run.name, id=identity, resume="allow", dir=str(run))


def _trackio(title: str, run: Path) -> Any:
    import trackio

    return trackio.init(project=PROJECT, name=title, group=run.name, resume="allow")


def _numbers(values: Mapping[str, Plain]) -> dict[str, float]:
    """Those values that are finite numbers."""
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float)) and isfinite(value)}
