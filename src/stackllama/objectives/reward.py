"""The reward model: all answers of a question in one pass, loss over its pairs, questions of given weights.

The loss of a pair is -log sigmoid(score of the better - score of the worse - margin) (Bradley-Terry; Stiennon et al.
2020, eq. 1; all pairs of one prompt in one pass as in Ouyang et al. 2022, section 3.5; the margin as in Touvron et al.
2023, eq. 2). A pair weighs 1 / (pairs of its question), times the question's weight; usually that and the margin are 1
and 0.

Two options, off by default. *Centring* adds the square of (score of the better + score of the worse), which no pair's
loss sees (Eisenstein et al. 2023, eq. 2). A *length penalty* c lets c * log(tokens) explain the pairs beside the score,
so that the score learns what length leaves over: the loss of a pair is -log sigmoid(score of the better - score of the
worse - margin + c * log(tokens of the better / tokens of the worse)). That is the regularization of Park et al. 2024
("Disentangling length from quality in direct preference optimization") for a reward model, with log tokens for tokens.
Where a score can be linear in log tokens, the slope at the minimum of this loss alone is exactly c less, and nothing
else changes.
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
    """Pairwise logistic loss, divided by the batch's ``questions``; with ``centring`` above 0, so much of the centring
    term beside it. ``length_penalty``: reward taken off per natural log of an answer's tokens.

    Metrics, weighted like the loss: ``accuracy`` (ties count one half), ``margin`` (better minus worse) and
    ``length_slope`` (of the margin over the log ratio of lengths, by least squares through 0).
    """

    metric_counts: Mapping[str, str] = {
        "accuracy": "questions",
        "margin": "questions",
        "length_slope": "length_ratios",
    }

    def __init__(self, role: str, *, centring: float = 0.0, length_penalty: float = 0.0) -> None:
        self.role = role
        self.terms: Mapping[str, Term] = {"pairwise_loss": Term(1.0, "questions")}
        if centring:
            self.terms = {**self.terms, "centring_loss": Term(centring, "questions")}
        self._length_penalty = length_penalty

    def __call__(self, role: Role, row: RewardRow) -> Sums:
        """The row's weighted sums over pairs."""
        score_B = role.score(HEAD, role.hidden_at(row.forest, row.last_B))
        better_P, worse_P = score_B[row.better_P], score_B[row.worse_P]
        gap_P = better_P - worse_P
        losses_P = {
            "pairwise_loss": -logsigmoid(gap_P - _asked_gap(row, self._length_penalty)),
            "centring_loss": (better_P + worse_P).square(),
        }
        known_P = gap_P.detach()
        right_P = (known_P > 0).float() + 0.5 * (known_P == 0).float()
        return Sums(
            {name: (row.weight_P * losses_P[name]).sum() for name in self.terms},
            {
                "accuracy": (row.weight_P * right_P).sum(),
                "margin": (row.weight_P * known_P).sum(),
                "length_slope": (row.weight_P * known_P * row.length_ratio_P).sum(),
            },
        )


def _asked_gap(row: RewardRow, length_penalty: float) -> Tensor:
    """By how much the better answer is to score above the worse one (P,): the margin, less what length explains."""
    return row.margin_P - length_penalty * row.length_ratio_P


def fit_head(trunk: Trunk, role: str, rows: Iterable[RewardRow], *, length_penalty: float = 0.0) -> None:
    """Set the head to the best linear reward on the role's hidden states; nothing else is trained.

    What a role knows is often there from the start, in directions that vary too little for gradient descent to find
    soon; a head that reads them gives the other weights something to amplify. Minimizes the objective's pairwise loss
    over the rows, with `PENALTY` and without centring, by L-BFGS in fp64; the bias, which no pair can see, stays.
    Source: linear probing, then fine-tuning (Kumar et al. 2022).
    """
    gaps: list[Tensor] = []
    asked: list[Tensor] = []
    weights: list[Tensor] = []
    with trunk.use(role) as reader:
        for row in rows:
            hidden_BD = reader.hidden_at(row.forest, row.last_B).double().cpu()
            gaps.append(hidden_BD[row.better_P] - hidden_BD[row.worse_P])
            asked.append(_asked_gap(row, length_penalty).double())
            weights.append(row.weight_P.double())
    gap_PD = torch.cat(gaps)
    share_P = torch.cat(weights) / sum(weight_P.sum() for weight_P in weights)
    scale_D = gap_PD.square().mean(0).sqrt().clamp_min(1e-12)
    weight_D = _minimize(gap_PD / scale_D, torch.cat(asked), share_P) / scale_D
    with torch.no_grad():
        trunk.trainable(role)[f"head.{HEAD}.weight"].copy_(weight_D)


def _minimize(feature_PD: Tensor, asked_P: Tensor, share_P: Tensor) -> Tensor:
    """The weights (D,) of the penalized logistic loss's one minimum."""
    weight_D = torch.zeros(feature_PD.shape[1], dtype=feature_PD.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_D], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = -(share_P * logsigmoid(feature_PD @ weight_D - asked_P)).sum() + PENALTY / 2 * weight_D.square().sum()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return weight_D.detach()
