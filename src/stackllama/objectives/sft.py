"""Supervised fine-tuning: the mean cross-entropy of the scored tokens.

Left out on purpose: label smoothing and loss reweighting; the mean is over tokens, so long answers weigh by their
length.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stackllama.model.roles import Role
from stackllama.objectives.base import Sums, Term
from stackllama.tokens.batches import SftRow


class SftObjective:
    """-sum of log p(token), divided by the batch's ``tokens``."""

    role = "sft"
    terms: Mapping[str, Term] = {"loss": Term(1.0, "tokens")}
    metric_counts: Mapping[str, str] = {}

    def __call__(self, role: Role, row: SftRow) -> Sums:
        """The row's summed negative log-likelihood in nats."""
        hidden_ND = role.hidden(row.forest)[row.targets.predictor_N]
        loss, _, _ = role.summed_loss(hidden_ND, row.targets.label_N, _negative_logprobs)
        return Sums({"loss": loss}, {})


def _negative_logprobs(part: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:  # noqa: ARG001
    return -logprob_C
