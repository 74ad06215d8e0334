"""What the loop knows of an objective.

A source (`stackllama.tokens.batches`) yields batches with their own counts; an objective turns each packed row of a
batch into *sums*; the loop divides sums by counts. So neither packing nor accumulation nor sharding can change the
loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from stackllama.model.roles import Role

RowT_contra = TypeVar("RowT_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Sums:
    """What an objective found in one row: sums of loss terms (with gradient) and of metrics (without), by name."""

    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Term:
    """A loss term: its coefficient in the loss and the name of the batch's count that divides its sum."""

    coefficient: float
    count: str


class Objective(Protocol[RowT_contra]):
    """Turns a packed row into sums, under a role of the trunk."""

    role: str
    terms: Mapping[str, Term]
    metric_counts: Mapping[str, str]

    def __call__(self, role: Role, row: RowT_contra) -> Sums:
        """Sums over one row, computed inside the entered role."""
