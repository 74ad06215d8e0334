"""Proximal policy optimization with a clipped value loss (Schulman et al. 2017; details as in Stiennon et al. 2020);
and its rivals without a value head (RLOO, GRPO, REINFORCE), which differ by their advantages alone.

Terms, all means over the response tokens of the minibatch:

- policy (eq. 7): max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(log pi(token) - old log-probability);
  to it are added minus the entropy times its bonus, where there is one (Schulman et al. 2017, eq. 9), and, where the
  loss and not the reward charges the KL, its price times k3 of policy and reference (Shao et al. 2024, eq. 4);
- value, where there is a value head: 1/2 max((v - R)^2, (clip(v, old - value_clip, old + value_clip) - R)^2).

Advantages come whitened or not, as the source made them; this file only computes the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stackllama.model.roles import Role
from stackllama.objectives.base import Sums, Term
from stackllama.objectives.kl import k3
from stackllama.tokens.forest import Forest, Targets

HEAD = "value"


@dataclass(frozen=True, slots=True)
class PPORow:
    """A packed row of prompts with their sampled responses; N response tokens, all fp32.

    old_logprob_N and old_value_N: the trainer's own, before the batch's first step; reference_N: log-probability by the
    reference; advantage_N; return_N: the value's target. Without a value head old_value_N and return_N are None.
    """

    forest: Forest
    targets: Targets
    old_logprob_N: Tensor
    reference_N: Tensor
    old_value_N: Tensor | None
    advantage_N: Tensor
    return_N: Tensor | None


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """clip: most that a value may move from the sampled one, in reward; coefficient: its weight in the loss."""

    clip: float
    coefficient: float


def policy_loss(logprob_N: Tensor, old_logprob_N: Tensor, advantage_N: Tensor, *, clip: float) -> Tensor:
    """Clipped surrogate loss of each token (N,)."""
    ratio_N = torch.exp(logprob_N - old_logprob_N)
    return torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(1.0 - clip, 1.0 + clip))


def value_loss(value_N: Tensor, old_value_N: Tensor, return_N: Tensor, *, clip: float) -> Tensor:
    """Clipped squared error of each token (N,)."""
    clipped_N = old_value_N + (value_N - old_value_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_N - return_N).square(), (clipped_N - return_N).square())


class PPOObjective:
    """The terms above, divided by the batch's ``tokens``. value: of the value head, or None where there is none;
    entropy_bonus, kl_coefficient: reward for a nat of entropy and price of a nat of KL, a token; 0 leaves them out.

    Metrics, means over tokens: ``approximate_kl`` (half the squared log-ratio), ``clip_fraction``, ``ratio_mean``,
    ``entropy`` in nats, ``kl_loss`` where the loss charges the KL, and with a value head ``value_clip_fraction``.
    """

    role = "policy"

    def __init__(
        self, *, clip: float, value: ValueLoss | None, entropy_bonus: float = 0.0, kl_coefficient: float = 0.0
    ) -> None:
        terms = {"policy_loss": Term(1.0, "tokens")}
        metrics = ["approximate_kl", "clip_fraction", "ratio_mean", "entropy"]
        if value is not None:
            terms["value_loss"] = Term(value.coefficient, "tokens")
            metrics.append("value_clip_fraction")
        if kl_coefficient:
            metrics.append("kl_loss")
        self.terms: Mapping[str, Term] = terms
        self.metric_counts: Mapping[str, str] = dict.fromkeys(metrics, "tokens")
        self._clip = clip
        self._entropy_bonus = entropy_bonus
        self._kl_coefficient = kl_coefficient
        self._value = value

    def __call__(self, role: Role, row: PPORow) -> Sums:
        """The row's sums over response tokens."""
        hidden_ND = role.hidden_at(row.forest, row.targets.predictor_N)

        def loss(part: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
            found_C = policy_loss(logprob_C, row.old_logprob_N[part], row.advantage_N[part], clip=self._clip)
            if self._entropy_bonus:
                found_C = found_C - self._entropy_bonus * entropy_C
            if self._kl_coefficient:
                found_C = found_C + self._kl_coefficient * k3(logprob_C, row.reference_N[part])
            return found_C

        total, logprob_N, entropy_N = role.summed_loss(hidden_ND, row.targets.label_N, loss, with_entropies=True)
        losses = {"policy_loss": total}
        with torch.no_grad():
            difference_N = logprob_N - row.old_logprob_N
            ratio_N = difference_N.exp()
            metrics = {
                "approximate_kl": 0.5 * difference_N.square().sum(),
                "clip_fraction": ((ratio_N - 1.0).abs() > self._clip).float().sum(),
                "ratio_mean": ratio_N.sum(),
                "entropy": entropy_N.sum(),
            }
            if self._kl_coefficient:
                metrics["kl_loss"] = k3(logprob_N, row.reference_N).sum()
        if self._value is not None:
            assert row.old_value_N is not None, "a source without values"
            assert row.return_N is not None
            value_N = role.score(HEAD, hidden_ND)
            losses["value_loss"] = value_loss(value_N, row.old_value_N, row.return_N, clip=self._value.clip).sum()
            moved_N = (value_N.detach() - row.old_value_N).abs()
            metrics["value_clip_fraction"] = (moved_N > self._value.clip).float().sum()
        return Sums({name: losses[name] for name in self.terms}, metrics)
