"""Beginning a stage, going on with it, and noting what it made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from stackllama.errors import RunError
from stackllama.files import atomic_write_json, read_json
from stackllama.run import Run
from stackllama.summary import merge_summary


@contextmanager
def open_stage(
    run: Run, stage: str, *, inputs: Mapping[str, str] | None = None, accelerator: str | None = None
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Begin a stage or go on with it; yields its folder, and a dict to be filled with the hashes of what it made.

    inputs: hashes of what comes from outside the run; accelerator: the GPU that computes.

    When the block ends well the stage is complete. Its seconds add up over all the times that it was gone on with.
    """
    for remark in run.begin(stage, inputs=inputs, accelerator=accelerator):
        print(remark)
    folder, outputs = run.stage(stage), dict[str, str]()
    start = time.perf_counter()
    kept = folder / "seconds.json"
    before = _seconds(kept) if kept.exists() else 0.0
    try:
        yield folder, outputs
    finally:
        seconds = before + time.perf_counter() - start
        atomic_write_json(kept, seconds)
    merge_summary(run.folder, {"seconds": {stage: seconds}})
    run.finish(stage, outputs=outputs)


def _seconds(path: Path) -> float:
    """The seconds that a stage's clock shows."""
    seconds = read_json(path)
    if type(seconds) not in (int, float) or not 0 <= seconds < float("inf"):
        raise RunError(f"{path} holds no number of seconds; delete it and give the same command again")
    return float(seconds)
