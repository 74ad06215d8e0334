"""A toy run through the real loop: one small layer learns to count, in a few milliseconds a step."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import stackllama.model.attention  # noqa: F401  (registers "forest")
from stackllama.model.roles import Role, Trunk
from stackllama.objectives.base import Sums, Term
from stackllama.objectives.sft import SftObjective
from stackllama.tokens.batches import Batch, SftRow, StepResult
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import sft_row, sft_source
from stackllama.train.guard import Guard, Sensitivity
from stackllama.train.loop import Loop, Settings
from stackllama.train.metrics import JsonlLog
from stackllama.train.optim import make_optimizer, optimizer_state

VOCABULARY = 67

SHORT = Sensitivity(window=40, warmup=20, clip=8.0, skip=12.0, rewind_after=4, rewinds=3)
USUAL = Sensitivity(window=100, warmup=50, clip=8.0, skip=12.0, rewind_after=4, rewinds=3)
RATE = 1e-2
Callback = Callable[[StepResult], Mapping[str, float] | None]


def small_model() -> PreTrainedModel:
    """One layer of random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="forest")
    assert isinstance(model, PreTrainedModel)
    return model


def counting(seed: int, documents: int) -> list[Tree]:
    """Documents that count upwards from anywhere, with one token in twenty by chance."""
    draw = random.Random(seed)
    found = []
    for key in range(documents):
        token = draw.randrange(3, VOCABULARY)
        tokens = []
        for _ in range(draw.randint(8, 30)):
            tokens.append(token if draw.random() > 0.05 else draw.randrange(3, VOCABULARY))
            token = 3 + (token - 2) % (VOCABULARY - 3)
        found.append(Tree(tuple(tokens), (), key))
    return found


def gibberish(seed: int) -> tuple[SftRow, ...]:
    """A row of tokens by chance."""
    draw = random.Random(seed)
    trees = [Tree(tuple(draw.randrange(3, VOCABULARY) for _ in range(30)), (), key) for key in range(4)]
    return (sft_row(trees, everything=True),)


class Spoiled(torch.autograd.Function):
    """Leaves a loss as it is, and makes its gradient NaN."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


Fault = Callable[[Tensor], Tensor]
FAULTS: Mapping[str, Fault] = {
    "NaN in the gradient": lambda loss: Spoiled.apply(loss),  # type: ignore[no-untyped-call]
    "loss NaN": lambda loss: loss * float("nan"),
    "loss infinite": lambda loss: loss * float("inf"),
    "loss times 100": lambda loss: loss * 100.0,
}


class Faulty:
    """The SFT objective with a fault in some steps of its loop."""

    role = "sft"
    terms: Mapping[str, Term] = SftObjective.terms
    metric_counts: Mapping[str, str] = SftObjective.metric_counts

    def __init__(self, loop: Loop[SftRow], faults: Mapping[int, Fault]) -> None:
        self._loop = loop
        self._faults = faults
        self._inner = SftObjective()

    def __call__(self, role: Role, row: SftRow) -> Sums:
        found = self._inner(role, row)
        fault = self._faults.get(self._loop.step)
        if fault is None:
            return found
        return Sums({name: fault(loss) for name, loss in found.losses.items()}, found.metrics)


class Poisoned:
    """A source some of whose batches are gibberish, by the number of the batch from 1."""

    def __init__(self, inner: Any, batches: frozenset[int]) -> None:
        self._inner = inner
        self._batches = batches
        self.unit, self.total_work = inner.unit, inner.total_work
        self.prepare, self.observe = inner.prepare, inner.observe
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    def next(self) -> Batch[SftRow] | None:
        batch: Batch[SftRow] | None = self._inner.next()
        at = self._inner.state_dict()["place"]
        if batch is None or at not in self._batches:
            return batch
        rows = gibberish(at)
        return Batch(rows, {"tokens": float(sum(len(row.targets.label_N) for row in rows))}, batch.work, batch.notes)


def make_toy(
    folder: Path,
    *,
    steps: int = 150,
    seed: int = 0,
    faults: Mapping[int, Fault] | None = None,
    poisoned: frozenset[int] = frozenset(),
    sensitivity: Sensitivity | None = SHORT,
    callbacks: tuple[Callback, ...] = (),
    checkpoint_steps: int = 10,
    rate: float = RATE,
) -> Loop[SftRow]:
    """A loop over documents that count, 100 tokens a step."""
    folder.mkdir(parents=True, exist_ok=True)
    trunk = Trunk(small_model(), precision=torch.float32)
    trunk.train_in_place("sft")
    torch.manual_seed(7)
    source = sft_source(
        counting(seed, 400),
        everything=True,
        tokens_per_step=100,
        row_tokens=100,
        epochs=1000,
        max_steps=steps,
        seed=seed,
    )
    loop = Loop(
        trunk=trunk,
        objective=SftObjective(),
        source=Poisoned(source, poisoned),
        optimizer=make_optimizer(trunk.trainable("sft"), learning_rate=rate),
        learning_rate=lambda step: rate,
        guard=Guard(None, sensitivity),
        settings=Settings(clip_norm=1e9, checkpoint_steps=checkpoint_steps, log_steps=1),
        folder=folder / "checkpoints",
        log=JsonlLog(folder / "metrics.jsonl"),
        title="toy",
        after_step=callbacks,
    )
    loop.objective = Faulty(loop, faults or {})
    return loop


def held_out(loop: Loop[SftRow]) -> float:
    """Mean loss, in nats per token, on documents that no run has seen."""
    row = sft_row(counting(10_000, 100), everything=True)
    with loop.trunk.use("sft") as role:
        found = SftObjective()(role, row)
    return float(found.losses["loss"]) / len(row.targets.label_N)


def state_of(loop: Loop[SftRow]) -> dict[str, Tensor]:
    """Copies of all weights and of the optimizer's moments, by name."""
    found = {**loop.trunk.state("sft"), **optimizer_state(loop.optimizer)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}
