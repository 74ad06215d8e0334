"""What the sampler's probabilities differ by from the trainer's, and what is done about it.

Both compute the same policy, each with kernels of its own. What is learned from is the trainer's; tokens are drawn by
the sampler's. So PPO's samples come from a policy a little beside the one that its ratios start from. A weight puts
that right in the mean; it is cut, since a few large ones would be most of the gradient.

Legend: M response tokens of a round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stackllama.errors import TrainingError


def truncated_weights(logprob_M: Tensor, sampled_M: Tensor, *, cap: float) -> Tensor:
    """Weight of each token (M,): its probability by the trainer over that by the sampler, at most ``cap``.

    Truncated importance sampling: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; Ionides 2008, "Truncated importance sampling", for the cut.
    """
    return torch.exp(logprob_M.detach() - sampled_M).clamp(max=cap)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """cap: the largest weight of a token, or None where no token is weighted; limit: nats a token that sampler and
    trainer may be apart in the mean.
    """

    cap: float | None
    limit: float

    def weights(self, logprob_M: Tensor, sampled_M: Tensor) -> tuple[Tensor | None, dict[str, float]]:
        """Weights (M,), or None, of tokens with these log-probabilities by trainer and sampler; and the numbers to log.

        Raises:
            TrainingError: when the two are further apart than the limit, or not finite.
        """
        apart_M = (logprob_M - sampled_M).abs()
        notes = {"sampler_difference": float(apart_M.mean()), "sampler_difference_max": float(apart_M.max())}
        self._check(notes["sampler_difference"], notes["sampler_difference_max"], len(apart_M))
        if self.cap is None:
            return None, notes
        weight_M = truncated_weights(logprob_M, sampled_M, cap=self.cap)
        cut_M = logprob_M - sampled_M > math.log(self.cap)
        return weight_M, {
            **notes,
            "importance_weight": float(weight_M.mean()),
            "importance_truncated": float(cut_M.float().mean()),
        }

    def _check(self, mean: float, largest: float, tokens: int) -> None:
        if not mean <= self.limit:  # NaN is refused too
            raise TrainingError(
                f"the sampler's log-probabilities are {mean:.3g} nats a token from the trainer's (mean absolute "
                f"difference over {tokens} sampled tokens; the largest: {largest:.3g}), but "
                f"ppo.sampler_difference_limit allows {self.limit:.3g}: the policy that samples is not the one that is "
                "trained. Rounding is less with compute.dtype float32, and least with ppo.sampler own; raise the limit "
                "only where you know why they differ"
            )


UNLIMITED = Mismatch(cap=None, limit=math.inf)
"""No weights, and whatever difference there is."""
