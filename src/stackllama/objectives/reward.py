"""The reward model: all answers of a question in one pass, loss over its pairs, questions of given weights.

The loss of a pair is -log sigmoid(score of the better - score of the worse - margin) (Bradley-Terry; Stiennon et al.
2020, eq. 1; all pairs of one prompt in one pass as in Ouyang et al. 2022, section 3.5; the margin as in Touvron et al.
2023, eq. 2). A pair weighs 1 / (pairs of its question), times the question's weight; usually that and the margin are 1
and 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stackllama.model.roles import Role, Trunk
from stackllama.objectives.base import Sums, Term
from stackllama.tokens.batches import RewardRow

HEAD = "reward"
PENALTY = 0.01
"""What `fit_head` adds to the loss: half of this times the squared weights, of features scaled to 1."""


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
        loss = -(row.weight_P * logsigmoid(gap_P - row.margin_P)).sum()
        known_P = gap_P.detach()
        right_P = (known_P > 0).float() + 0.5 * (known_P == 0).float()
        return Sums(
            {"loss": loss},
            {"accuracy": (row.weight_P * right_P).sum(), "margin": (row.weight_P * known_P).sum()},
        )


def fit_head(trunk: Trunk, role: str, rows: Iterable[RewardRow]) -> None:
    """Set the head to the best linear reward on the role's hidden states; nothing else is trained.

    What a role knows is often there from the start, in directions that vary too little for gradient descent to find
    soon; a head that reads them gives the other weights something to amplify. Minimizes the objective's loss over the
    rows, with `PENALTY`, by L-BFGS in fp64; the bias, which no pair can see, stays. Source: linear probing, then fine-
    tuning (Kumar et al. 2022).
    """
    gaps: list[Tensor] = []
    margins: list[Tensor] = []
    weights: list[Tensor] = []
    with trunk.use(role) as reader:
        for row in rows:
            hidden_BD = reader.hidden(row.forest)[row.last_B].double()
            gaps.append(hidden_BD[row.better_P] - hidden_BD[row.worse_P])
            margins.append(row.margin_P.double())
            weights.append(row.weight_P.double())
    gap_PD = torch.cat(gaps)
    share_P = torch.cat(weights) / sum(weight_P.sum() for weight_P in weights)
    scale_D = gap_PD.square().mean(0).sqrt().clamp_min(1e-12)
    weight_D = _minimize(gap_PD / scale_D, torch.cat(margins), share_P) / scale_D
    with torch.no_grad():
        trunk.trainable(role)[f"head.{HEAD}.weight"].copy_(weight_D)


def _minimize(feature_PD: Tensor, margin_P: Tensor, share_P: Tensor) -> Tensor:
    """The weights (D,) of the penalized logistic loss's one minimum."""
    weight_D = torch.zeros(feature_PD.shape[1], dtype=feature_PD.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = -(share_P * logsigmoid(feature_PD @ weight_D - margin_P)).sum() + PENALTY / 2 * weight_D.square().sum()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return weight_D.detach()
