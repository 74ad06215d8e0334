"""The loop: resumed equals uninterrupted, the guard keeps weights, neither accumulation nor packing shows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stackllama.errors import CheckpointError, TrainingError
from stackllama.model.roles import LoRA, Role, Trunk
from stackllama.objectives.base import Sums, Term
from stackllama.objectives.sft import SftObjective
from stackllama.tokens.batches import Batch, SftRow
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import PlannedSource, sft_source
from stackllama.train import checkpoint
from stackllama.train.guard import Guard, Judgement
from stackllama.train.loop import MOST_REFUSED, Loop, Settings
from stackllama.train.metrics import JsonlLog, read_log
from stackllama.train.optim import make_optimizer
from tests.model.tiny import random_trees, tiny_model

ADAPTER = LoRA(4, 8.0, 0.05, ("q_proj", "v_proj", "up_proj"))


class StopHereError(Exception):
    pass


def trees() -> list[Tree]:
    return [tree for seed in range(4) for tree in random_trees(seed) if tree.branches]


def make_loop(
    folder: Path, *, row_tokens: int = 400, dropout: float = 0.05, stop_at: int | None = None
) -> Loop[SftRow]:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    trunk.add_adapter("sft", LoRA(4, 8.0, dropout, ADAPTER.targets), seed=0)
    torch.manual_seed(7)
    source = sft_source(
        trees(), everything=False, tokens_per_step=500, row_tokens=row_tokens, epochs=2, max_steps=None, seed=0
    )

    def interrupt(result: object) -> Mapping[str, float] | None:
        if stop_at is not None and loop.step == stop_at:
            raise StopHereError
        return None

    loop = Loop(
        trunk=trunk,
        objective=SftObjective(),
        source=source,
        optimizer=make_optimizer(trunk.trainable("sft"), learning_rate=1e-2),
        learning_rate=lambda step: 1e-2 / (step + 1),
        guard=Guard(),
        settings=Settings(clip_norm=1.0, checkpoint_steps=2, log_steps=1),
        folder=folder / "checkpoints",
        log=JsonlLog(folder / "metrics.jsonl"),
        title="test",
        after_step=(interrupt,),
    )
    return loop


def weights(loop: Loop[SftRow]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loop.trunk.state("sft").items()}


def test_the_schedule_decides_how_far_a_step_goes(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.learning_rate = lambda step: 0.0 if step else 1e-2
    seen = [weights(loop)]
    loop.after_step = (lambda result: seen.append(weights(loop)),)
    loop.run()
    assert len(seen) > 2
    moved = [any(not torch.equal(old[name], new[name]) for name in old) for old, new in pairwise(seen)]
    assert moved == [True] + [False] * (len(moved) - 1)


def test_resumed_equals_uninterrupted_to_the_bit_with_dropout_and_everything(tmp_path: Path) -> None:
    (tmp_path / "whole_").mkdir()
    whole = make_loop(tmp_path / "whole_")
    whole.run()
    expected = weights(whole)
    for stop_at in (1, 3, 4):
        folder = tmp_path / str(stop_at)
        folder.mkdir()
        with pytest.raises(StopHereError):
            make_loop(folder, stop_at=stop_at).run()
        torch.manual_seed(99)  # a resumed process has another state of the global generator
        resumed = make_loop(folder)
        resumed.run()
        assert resumed.step == whole.step
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
        assert read_log(folder / "metrics.jsonl") == read_log(tmp_path / "whole_" / "metrics.jsonl")


@pytest.mark.parametrize("key", ["weights", "optimizer", "source", "guard", "refused", "work", "random"])
def test_a_checkpoint_of_another_version_is_told(tmp_path: Path, key: str) -> None:
    with pytest.raises(StopHereError):
        make_loop(tmp_path, stop_at=4).run()
    found = checkpoint.load_latest(tmp_path / "checkpoints")
    assert found is not None
    step, state = found
    shutil.rmtree(tmp_path / "checkpoints")
    checkpoint.save(tmp_path / "checkpoints", step, {name: part for name, part in state.items() if name != key})
    with pytest.raises(CheckpointError, match=rf"lacks '{key}'.*delete {tmp_path}"):
        make_loop(tmp_path).run()


def test_a_finished_loop_started_again_does_nothing(tmp_path: Path) -> None:
    first = make_loop(tmp_path)
    first.run()
    again = make_loop(tmp_path)
    assert again.run() == 0
    assert all(torch.equal(tensor, weights(first)[name]) for name, tensor in weights(again).items())


def test_rows_of_another_length_give_the_same_losses(tmp_path: Path) -> None:
    logs = []
    for row_tokens in (310, 400, 2000):
        folder = tmp_path / str(row_tokens)
        folder.mkdir()
        make_loop(folder, row_tokens=row_tokens, dropout=0.0).run()
        logs.append(torch.tensor([line["loss"] for line in read_log(folder / "metrics.jsonl")]))
    for other in logs[1:]:
        assert (other - logs[0]).norm() <= 1e-5 * logs[0].norm()


class Poisoned:
    """SFT whose third call gives a loss that is not finite."""

    role = "sft"
    terms: Mapping[str, Term] = {"loss": Term(1.0, "tokens")}
    metric_counts: Mapping[str, str] = {}

    def __init__(self, poison: float) -> None:
        self.calls = 0
        self.poison = poison

    def __call__(self, role: Role, row: SftRow) -> Sums:
        self.calls += 1
        found = SftObjective()(role, row)
        return Sums({"loss": found.losses["loss"] * (self.poison if self.calls == 3 else 1.0)}, {})


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_logged(tmp_path: Path, poison: float) -> None:
    loop = make_loop(tmp_path, row_tokens=2000)
    loop.objective = Poisoned(poison)
    before: list[dict[str, Tensor]] = []
    loop.after_step = (lambda result: before.append(weights(loop)),)
    loop.run()
    assert all(torch.equal(before[2][name], before[1][name]) for name in before[1])
    assert not all(torch.equal(before[3][name], before[2][name]) for name in before[1])
    skipped = [line["step"] for line in read_log(tmp_path / "metrics.jsonl") if "skipped" in line]
    assert skipped == [3]


def test_endless_refusals_end_the_run_with_an_error(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)

    class Always(Guard):
        def judge(self, step: int, **_: object) -> Judgement:
            return Judgement("loss is bad", "skipped", "loss", 1.0)

    loop.guard = Always()
    batch = loop.source.next()
    assert batch is not None
    loop.source = Endless(batch)  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=f"{MOST_REFUSED + 1} steps in a row were refused.*lower the learning rate"):
        loop.run()


class Endless:
    """A source that yields one batch for ever."""

    total_work = 1
    unit = "tokens"

    def __init__(self, batch: Batch[SftRow]) -> None:
        self.batch = batch

    def prepare(self) -> None:
        pass

    def next(self) -> Batch[SftRow]:
        return self.batch

    observe = PlannedSource.observe

    def state_dict(self) -> dict[str, int]:
        return {}
