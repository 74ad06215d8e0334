"""Direct preference optimization: the policy learns from pairs of people's answers, without sampling and without asking
a reward model.

The reward that a policy implies is beta * (log pi(answer) - log reference(answer)), log-probabilities summed over the
answer's tokens, its EOS included (Rafailov et al. 2023, "Direct preference optimization: your language model is
secretly a reward model", eq. 5). Of a pair only the *gap* counts, in nats:

    gap = (log pi - log reference)(better answer) - (log pi - log reference)(worse answer)

and a loss is a function of it:

- dpo (eq. 7): -log sigmoid(beta gap); with label smoothing s, which takes s of the votes for errors,
  -(1 - s) log sigmoid(beta gap) - s log sigmoid(-beta gap) (cDPO, Mitchell 2023);
- ipo (Azar et al. 2023, "A general theoretical paradigm to understand learning from human preferences", eq. 17):
  (gap - 1 / (2 beta))^2, so that a gap has an end even where all votes agree.

A pair's margin m, in reward, asks so much more of the gap: gap - m / beta stands for gap (Amini et al. 2024, "Direct
preference optimization with an offset"). A pair weighs as in reward training: 1 / (pairs of its question), times the
question's weight.

Legend: N scored tokens, B branches of a row, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from stackllama.model.roles import Role
from stackllama.objectives.base import Sums, Term
from stackllama.objectives.masked import sum_per_sequence
from stackllama.tokens.forest import Forest, Targets

PairLoss = Callable[[Tensor], Tensor]
"""The loss of each pair (P,) from its gap (P,) in nats."""


@dataclass(frozen=True, slots=True)
class DPORow:
    """A packed row of questions with answers that stand in pairs.

    reference_N: log-probability by the reference, fp32; better_P and worse_P: branches of the row, by pair; margin_P:
    fp32, in reward; weight_P: fp32, summing over a question's pairs to what the question counts for.
    """

    forest: Forest
    targets: Targets
    reference_N: Tensor
    better_P: Tensor
    worse_P: Tensor
    margin_P: Tensor
    weight_P: Tensor


def dpo_loss(gap_P: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss (P,) in nats. beta: reward per nat of gap; label_smoothing: share of votes taken for errors.

    Source: Rafailov et al. 2023, eq. 7; with smoothing Mitchell 2023, "A note on DPO with noisy preferences", eq. 3.
    """
    reward_P = beta * gap_P
    if not label_smoothing:
        return -logsigmoid(reward_P)
    return -(1.0 - label_smoothing) * logsigmoid(reward_P) - label_smoothing * logsigmoid(-reward_P)


def ipo_loss(gap_P: Tensor, *, beta: float) -> Tensor:
    """Squared distance (P,), in nats², of the gap from the one that is asked for, 1 / (2 beta) nats.

    Source: Azar et al. 2023, eq. 17, whose tau is beta.
    """
    return (gap_P - 1.0 / (2.0 * beta)).square()


LOSSES: Mapping[str, Callable[..., Tensor]] = {"dpo": dpo_loss, "ipo": ipo_loss}
"""By the name of `dpo.loss`; each takes gaps (P,) and beta."""


class DPOObjective:
    """The loss of pairs, divided by the batch's ``questions``. loss: of a gap; beta: reward per nat.

    Metrics, weighted like the loss, of the implied rewards: ``accuracy`` (ties count one half), ``margin`` (better
    minus worse), ``better_reward`` and ``worse_reward``.
    """

    role = "policy"
    terms: Mapping[str, Term] = {"preference_loss": Term(1.0, "questions")}
    metric_counts: Mapping[str, str] = dict.fromkeys(
        ("accuracy", "margin", "better_reward", "worse_reward"), "questions"
    )

    def __init__(self, loss: PairLoss, *, beta: float) -> None:
        self._loss = loss
        self._beta = beta

    def __call__(self, role: Role, row: DPORow) -> Sums:
        """The row's weighted sums over pairs."""
        logprob_N = role.logprobs(role.hidden(row.forest), row.targets)
        ratio_B = sum_per_sequence(logprob_N - row.reference_N, row.targets.branch_N, len(row.forest.branches))
        gap_P = ratio_B[row.better_P] - ratio_B[row.worse_P]
        loss_P = self._loss(gap_P - row.margin_P / self._beta)
        reward_B = self._beta * ratio_B.detach()
        better_P, worse_P = reward_B[row.better_P], reward_B[row.worse_P]
        right_P = (better_P > worse_P).float() + 0.5 * (better_P == worse_P).float()
        return Sums(
            {"preference_loss": (row.weight_P * loss_P).sum()},
            {
                "accuracy": (row.weight_P * right_P).sum(),
                "margin": (row.weight_P * (better_P - worse_P)).sum(),
                "better_reward": (row.weight_P * better_P).sum(),
                "worse_reward": (row.weight_P * worse_P).sum(),
            },
        )
