"""What trackers are given, read back from their own files: TensorBoard's always, those of the extra where it is
installed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from stackllama.errors import RecipeError
from stackllama.train import trackers
from stackllama.train.metrics import JsonlLog, read_log
from stackllama.train.trackers import TensorBoard, check_installed, tracked


def events(folder: Path) -> Iterator[Event]:
    """The events of all files of a folder, the oldest file first (TFRecord: length, its sum, data, their sum)."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event()
            event.ParseFromString(data[at + 12 : at + 12 + length])
            yield event
            at += 16 + length


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value, as TensorBoard shows it: what a session's start purges is gone."""
    found: dict[str, dict[int, float]] = {}
    for event in events(folder):
        if event.session_log.status == 1:  # a start: everything from this step on is purged
            found = {name: {s: v for s, v in points.items() if s < event.step} for name, points in found.items()}
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_has_the_numbers_of_each_step(tmp_path: Path) -> None:
    log = TensorBoard(tmp_path / "sft")
    log.truncate_after(0)
    log.append(1, loss=2.5, skipped="NaN in a gradient", guard_value=None, gradient_norm=math.inf)
    log.append(10, loss=1.25, accuracy=1)
    log.close()
    assert curves(tmp_path / "sft") == {"loss": {1: 2.5, 10: 1.25}, "accuracy": {10: 1.0}}


def test_steps_that_come_again_after_a_kill_replace_those_that_were_there(tmp_path: Path) -> None:
    killed = TensorBoard(tmp_path)
    for step in (1, 2, 3, 4):
        killed.append(step, loss=float(step))
    killed.close()
    again = TensorBoard(tmp_path)
    again.truncate_after(2)
    again.append(3, loss=30.0)
    again.close()
    assert curves(tmp_path) == {"loss": {1: 1.0, 2: 2.0, 3: 30.0}}


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    with tracked(JsonlLog(tmp_path / "metrics.jsonl"), ["tensorboard"], tmp_path / "run", "sft") as log:
        log.truncate_after(0)
    assert list(tmp_path.iterdir()) == []


def test_the_log_has_all_and_trackers_have_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with tracked(JsonlLog(path), ["tensorboard"], tmp_path / "run", "sft") as log:
        log.append(1, loss=2.5, skipped="why")
    assert read_log(path) == [{"step": 1, "loss": 2.5, "skipped": "why"}]
    assert curves(tmp_path / "run/tensorboard/sft") == {"loss": {1: 2.5}}


def test_a_tracker_that_is_not_installed_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_installed(["tensorboard"])
    with pytest.raises(RecipeError, match=r"track names wandb.*pip install 'stackllama\[trackers\]'"):
        check_installed(["tensorboard", "wandb"])


def test_weights_and_biases_has_a_run_for_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DATA_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    for stage in ("sft", "reward"):  # one after the other in one process
        with tracked(JsonlLog(tmp_path / "metrics.jsonl"), ["wandb"], tmp_path / "run", stage) as log:
            log.append(1, loss=2.5, skipped="why")
            log.append(2, loss=1.5)
    found = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 2


def test_trackio_keeps_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    with tracked(JsonlLog(tmp_path / "metrics.jsonl"), ["trackio"], tmp_path / "run", "sft") as log:
        log.append(1, loss=2.5)
        log.append(2, loss=1.5, skipped="why")
    assert list((tmp_path / "trackio").rglob("*"))
