"""Proximal policy optimization with a clipped value loss (Schulman et al. 2017; details as in Stiennon et al. 2020);
and its rivals without a value head (RLOO, GRPO, REINFORCE, rejection sampling), which differ by their advantages alone.

Terms, all means over the response tokens of the minibatch:

- policy (eq. 7): max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(log pi(token) - old log-probability), times
  the token's weight where another program sampled; to it are added minus the entropy times its bonus, where there is
  one (eq. 9), and, where the loss and not the reward charges the KL, its price times k3 of policy and reference (Shao
  et al. 2024, eq. 4), or k2;
- value, where there is a value head, the policy's or (by `ValueObjective`) that of a role of its own:
  1/2 max((v - R)^2, (clip(v, old - value_clip, old + value_clip) - R)^2).

While the value warms up its term alone has a gradient, which reaches nothing but the head; the others are measured.

Advantages come whitened or not, as the source made them; this file only computes the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stackllama.model.roles import Role
from stackllama.objectives.base import Sums, Term
from stackllama.objectives.kl import Estimator, k3
from stackllama.tokens.forest import Forest, Targets

HEAD = "value"


@dataclass(frozen=True, slots=True)
class PPORow:
    """A packed row of prompts with their sampled responses; N response tokens, all fp32.

    old_logprob_N and old_value_N: the trainer's own, before the batch's first step; reference_N: log-probability by the
    reference; advantage_N; return_N: the value's target. Without a value head old_value_N and return_N are None.
    value_alone: whether the value learns from it and the policy does not.
    weight_N: what the token's policy loss is multiplied by, constant; None where the sampler's probabilities are the
    trainer's own (`rollout/mismatch.py`).
    """

    forest: Forest
    targets: Targets
    old_logprob_N: Tensor
    reference_N: Tensor
    old_value_N: Tensor | None
    advantage_N: Tensor
    return_N: Tensor | None
    value_alone: bool = False
    weight_N: Tensor | None = None


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


class ValueObjective:
    """The value term alone, for a value that is a role of its own, divided by the batch's ``tokens``.

    Metric: ``value_clip_fraction``.
    """

    role = "value"
    metric_counts: Mapping[str, str] = {"value_clip_fraction": "tokens"}

    def __init__(self, value: ValueLoss) -> None:
        self.terms: Mapping[str, Term] = {"value_loss": Term(value.coefficient, "tokens")}
        self._value = value

    def __call__(self, role: Role, row: PPORow) -> Sums:
        """The row's sums over response tokens."""
        value_N = role.score(HEAD, role.hidden_at(row.forest, row.targets.predictor_N))
        loss, moved = _value_sums(value_N, row, self._value)
        return Sums({"value_loss": loss}, {"value_clip_fraction": moved})


class PPOObjective:
    """The terms above, divided by the batch's ``tokens``. value: of the policy's value head, or None where it has none;
    entropy_bonus, kl_coefficient: reward for a nat of entropy and price of a nat of KL, a token; 0 leaves them out;
    kl_estimator: k3 or k2, what that price is for.

    Metrics, means over tokens: ``approximate_kl`` (half the squared log-ratio), ``clip_fraction``, ``ratio_mean``,
    ``entropy`` in nats, ``kl_loss`` where the loss charges the KL, and with a value head ``value_clip_fraction``.
    """

    role = "policy"

    def __init__(
        self,
        *,
        clip: float,
        value: ValueLoss | None,
        entropy_bonus: float = 0.0,
        kl_coefficient: float = 0.0,
        kl_estimator: Estimator = k3,
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
        self._kl_estimator = kl_estimator
        self._entropy_bonus = entropy_bonus
        self._kl_coefficient = kl_coefficient
        self._value = value

    def __call__(self, role: Role, row: PPORow) -> Sums:
        """The row's sums over response tokens."""
        with torch.no_grad() if row.value_alone else nullcontext():
            hidden_ND = role.hidden_at(row.forest, row.targets.predictor_N)
            loss = partial(self._token_losses, row)
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
                metrics["kl_loss"] = self._kl_estimator(logprob_N, row.reference_N).sum()
        if self._value is not None:
            value_N = role.score(HEAD, hidden_ND)
            losses["value_loss"], metrics["value_clip_fraction"] = _value_sums(value_N, row, self._value)
        return Sums(losses, metrics)

    def _token_losses(self, row: PPORow, part: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        """The policy's loss of some of the row's tokens (C,)."""
        loss_C = policy_loss(logprob_C, row.old_logprob_N[part], row.advantage_N[part], clip=self._clip)
        if row.weight_N is not None:
            loss_C = row.weight_N[part] * loss_C
        if self._entropy_bonus:
            loss_C = loss_C - self._entropy_bonus * entropy_C
        if self._kl_coefficient:
            loss_C = loss_C + self._kl_coefficient * self._kl_estimator(logprob_C, row.reference_N[part])
        return loss_C


def _value_sums(value_N: Tensor, row: PPORow, how: ValueLoss) -> tuple[Tensor, Tensor]:
    """The sum of the row's value losses, and how many values have moved further than the clip."""
    assert row.old_value_N is not None, "a source without values"
    assert row.return_N is not None
    moved_N = (value_N.detach() - row.old_value_N).abs()
    loss = value_loss(value_N, row.old_value_N, row.return_N, clip=how.clip).sum()
    return loss, (moved_N > how.clip).float().sum()
