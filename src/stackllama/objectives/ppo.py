"""Proximal policy optimization with a clipped value loss (Schulman et al. 2017; details as in Stiennon et al. 2020).

Both terms are means over the response tokens of the minibatch:

- policy (eq. 7): max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(log pi(token) - old log-probability);
- value: 1/2 max((v - R)^2, (clip(v, old - value_clip, old + value_clip) - R)^2).

Advantages come whitened or not, as the source made them; this file only computes the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stackllama.model.roles import Role
from stackllama.objectives.base import Sums, Term
from stackllama.tokens.forest import Forest, Targets

HEAD = "value"


@dataclass(frozen=True, slots=True)
class PPORow:
    """A packed row of prompts with their sampled responses; N response tokens, all fp32.

    old_logprob_N and old_value_N: the trainer's own, before the batch's first step; advantage_N; return_N: the value's
    target.
    """

    forest: Forest
    targets: Targets
    old_logprob_N: Tensor
    old_value_N: Tensor
    advantage_N: Tensor
    return_N: Tensor


def policy_loss(logprob_N: Tensor, old_logprob_N: Tensor, advantage_N: Tensor, *, clip: float) -> Tensor:
    """Clipped surrogate loss of each token (N,)."""
    ratio_N = torch.exp(logprob_N - old_logprob_N)
    return torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(1.0 - clip, 1.0 + clip))


def value_loss(value_N: Tensor, old_value_N: Tensor, return_N: Tensor, *, clip: float) -> Tensor:
    """Clipped squared error of each token (N,)."""
    clipped_N = old_value_N + (value_N - old_value_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_N - return_N).square(), (clipped_N - return_N).square())


class PPOObjective:
    """Policy and value terms, divided by the batch's ``tokens``.

    Metrics, means over tokens: ``approximate_kl`` (half the squared log-ratio), ``clip_fraction``, ``ratio_mean``,
    ``entropy`` in nats, ``value_clip_fraction``.
    """

    role = "policy"
    metric_counts: Mapping[str, str] = dict.fromkeys(
        ("approximate_kl", "clip_fraction", "ratio_mean", "entropy", "value_clip_fraction"), "tokens"
    )

    def __init__(self, *, clip: float, value_clip: float, value_coefficient: float) -> None:
        self.terms: Mapping[str, Term] = {
            "policy_loss": Term(1.0, "tokens"),
            "value_loss": Term(value_coefficient, "tokens"),
        }
        self._clip = clip
        self._value_clip = value_clip

    def __call__(self, role: Role, row: PPORow) -> Sums:
        """The row's sums over response tokens."""
        hidden_TD = role.hidden(row.forest)
        logprob_N = role.logprobs(hidden_TD, row.targets)
        value_N = role.score(HEAD, hidden_TD[row.targets.predictor_N])
        losses = {
            "policy_loss": policy_loss(logprob_N, row.old_logprob_N, row.advantage_N, clip=self._clip).sum(),
            "value_loss": value_loss(value_N, row.old_value_N, row.return_N, clip=self._value_clip).sum(),
        }
        with torch.no_grad():
            difference_N = logprob_N - row.old_logprob_N
            ratio_N = difference_N.exp()
            moved_N = (value_N - row.old_value_N).abs()
            metrics = {
                "approximate_kl": 0.5 * difference_N.square().sum(),
                "clip_fraction": ((ratio_N - 1.0).abs() > self._clip).float().sum(),
                "ratio_mean": ratio_N.sum(),
                "entropy": role.entropies(hidden_TD, row.targets).sum(),
                "value_clip_fraction": (moved_N > self._value_clip).float().sum(),
            }
        return Sums(losses, metrics)
