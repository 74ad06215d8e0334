"""What travels from sources to the loop: packed rows, batches with their counts, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from stackllama.tokens.forest import Forest, Targets

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class Batch(Generic[RowT]):
    """The rows of one optimizer step, with the counts that divide its sums, known before the first backward.

    work: what the step adds to progress, in the source's unit; notes: numbers about the batch itself that are logged
    beside the objective's metrics; unusable: why nothing can be learned from it (then it may have no rows), or None;
    phase: changes where something else is learned from here on, whose numbers are not to be compared with those before.
    """

    rows: tuple[RowT, ...]
    counts: Mapping[str, float]
    work: int
    notes: Mapping[str, float]
    unusable: str | None = None
    phase: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of one batch. skipped: why it was refused (then no weight was changed), or None; rewound: the earlier
    step whose weights are in place again, so that whatever hangs on later ones is void, or None.
    """

    step: int
    loss: float
    metrics: Mapping[str, float]
    gradient_norm: float
    skipped: str | None
    rewound: int | None = None


class Source(Protocol[RowT]):
    """Where batches come from; it ends by yielding None. ``total_work`` is in ``unit``, such as tokens."""

    total_work: int
    unit: str

    def prepare(self) -> None:
        """Make the next batch already where it does not hang on what becomes of this one: called while a device is at
        work on that. What `state_dict` gives stays as it is.
        """

    def next(self) -> Batch[RowT] | None:
        """The next batch, or None at the end."""

    def observe(self, result: StepResult) -> None:
        """Hear what became of the last batch; a source may drop what it had planned next."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, as tensors and JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""


def on_device(row: RowT, device: torch.device) -> RowT:
    """A row with its tensors on a device. Its forest stays: what a model needs of it goes there with the plan."""
    moved: dict[str, Any] = {}
    for each in fields(row):  # type: ignore[arg-type]  # every row is a dataclass
        value = getattr(row, each.name)
        if isinstance(value, Tensor):
            moved[each.name] = value.to(device, non_blocking=True)
        elif isinstance(value, Targets):
            moved[each.name] = on_device(value, device)
    return replace(row, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class SftRow:
    """A packed row and the tokens that are learnt from it."""

    forest: Forest
    targets: Targets


@dataclass(frozen=True, slots=True)
class RewardRow:
    """A packed row of questions. last_B: place of each branch's last token, its EOS, where its score is read; better_P
    and worse_P: branches of the row, by pair; margin_P: fp32, in reward; weight_P: fp32, summing over a question's
    pairs to what the question counts for.
    """

    forest: Forest
    last_B: Tensor
    better_P: Tensor
    worse_P: Tensor
    margin_P: Tensor
    weight_P: Tensor

    @property
    def length_ratio_P(self) -> Tensor:
        """log(tokens of the better answer / tokens of the worse one), fp32; each answer's EOS counts."""
        lengths = [segment.length for segment in self.forest.branches]
        log_length_B = torch.tensor(lengths, dtype=torch.float32).log().to(self.last_B.device, non_blocking=True)
        return log_length_B[self.better_P] - log_length_B[self.worse_P]
