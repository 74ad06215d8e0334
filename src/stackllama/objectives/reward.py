"""The reward model: all answers of a question in one pass, loss over its pairs, every question of equal weight.

The loss of a pair is -log sigmoid(score of the better - score of the worse) (Bradley-Terry; Stiennon et al. 2020, eq.
1; all pairs of one prompt in one pass as in Ouyang et al. 2022, section 3.5). A pair weighs 1 / (pairs of its
question).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stackllama.model.roles import Role
from stackllama.objectives.base import Sums, Term
from stackllama.tokens.batches import RewardRow

HEAD = "reward"


class RewardObjective:
    """Pairwise logistic loss, divided by the batch's ``questions``.

    Metrics, weighted like the loss: ``accuracy`` (ties count one half) and ``margin`` (better minus worse).
    """

    terms: Mapping[str, Term] = {"loss": Term(1.0, "questions")}
    metric_counts: Mapping[str, str] = {"accuracy": "questions", "margin": "questions"}

    def __init__(self, role: str) -> None:
        self.role = role

    def __call__(self, role: Role, row: RewardRow) -> Sums:
        """The row's weighted sums over pairs."""
        score_B = role.score(HEAD, role.hidden(row.forest)[row.last_B])
        gap_P = score_B[row.better_P] - score_B[row.worse_P]
        loss = -(row.weight_P * torch.nn.functional.logsigmoid(gap_P)).sum()
        known_P = gap_P.detach()
        right_P = (known_P > 0).float() + 0.5 * (known_P == 0).float()
        return Sums(
            {"loss": loss},
            {"accuracy": (row.weight_P * right_P).sum(), "margin": (row.weight_P * known_P).sum()},
        )
