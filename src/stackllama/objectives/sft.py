"""Supervised fine-tuning: the mean cross-entropy of the scored tokens.

Left out on purpose: label smoothing and loss reweighting; the mean is over tokens, so long answers weigh by their
length.
"""

from __future__ import annotations

from collections.abc import Mapping

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
        return Sums({"loss": -role.summed_logprobs(role.hidden(row.forest), row.targets)}, {})
