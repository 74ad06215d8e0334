"""How far the policy has drifted from its reference: estimators for each token, and who sets the price of drifting.

N: response tokens of the batch, sampled from the policy. All in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from stackllama.errors import CheckpointError, TrainingError

LARGEST_CHANGE = 0.2  # an update sees the relative error of the KL clipped to this (Ziegler et al. 2019)


def k1(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """Give log(policy / reference): unbiased, often negative, noisy. Float (N), of the sampled tokens."""
    return logp_N - reference_N


def k2(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """Give half the squared log-ratio: never negative, little noise, biased. Float (N).

    Its gradient is not biased: on the policy's own samples, log(policy / reference) times the gradient of log policy
    has the gradient of the KL as its mean.
    """
    return 0.5 * (logp_N - reference_N).square()


def k3(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """Give (r - 1) - log r with r = reference / policy: unbiased, never negative, little noise. Float (N).

    `expm1` keeps the digits that `exp(x) - 1` would lose while the two models are still close.
    """
    log_ratio_N = reference_N - logp_N
    return torch.expm1(log_ratio_N) - log_ratio_N


# Source of all three: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html
Estimator = Callable[[Tensor, Tensor], Tensor]
"""(policy's, reference's log-probabilities (N,) of sampled tokens) -> KL of each (N,)."""
ESTIMATORS: Mapping[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}


class Controller(Protocol):
    """Sets `coefficient`, the price of one nat of KL in units of reward."""

    @property
    def coefficient(self) -> float:
        """Reward per nat."""

    @property
    def stop_at(self) -> float | None:
        """KL, in nats per response, at which training is to end; None: it is never ended by its KL."""

    def update(self, kl: float, n: int) -> None:
        """Take in the KL (nats per response) measured over `n` episodes."""

    def state_dict(self) -> dict[str, float]:
        """Give what a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict`."""


class AdaptiveController:
    """Raises the price while the KL is above its target, lowers it while it is below.

    coefficient: start value, reward per nat, > 0. target: nats per response, > 0. horizon: episodes, > 0; after about
    so many episodes at a clipped error the price has changed by 22%. Source: Ziegler et al. 2019, "Fine-tuning language
    models from human preferences", section 2.2.
    """

    stop_at: float | None = None

    def __init__(self, coefficient: float, target: float, horizon: float) -> None:
        for name, number in (("coefficient", coefficient), ("target", target), ("horizon", horizon)):
            _require(name, number, number > 0, "a number above 0")
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Take in the measured KL (nats, mean over responses of the sum over tokens) of `n` episodes.

        Raises TrainingError for a KL that is not finite, ValueError for `n` outside 1 to 5 * horizon - 1 (one clipped
        update could then turn the price negative).
        """
        if not math.isfinite(kl):
            raise TrainingError(f"the KL divergence is {kl}, so its price cannot be adapted: lower ppo's learning rate")
        if not 1 <= n < self.horizon / LARGEST_CHANGE:
            raise ValueError(
                f"n is {n} episodes, allowed are 1 to less than {self.horizon / LARGEST_CHANGE:g} (5 horizons)"
            )
        error = min(max(kl / self.target - 1, -LARGEST_CHANGE), LARGEST_CHANGE)
        self.coefficient *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Give what a resumed run needs; target and horizon are there to be compared."""
        return {"coefficient": self.coefficient, "target": self.target, "horizon": self.horizon}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict`. Raises CheckpointError for missing or unknown keys, or another target or horizon."""
        _require_keys(state, ("coefficient", "target", "horizon"))
        for name in ("target", "horizon"):
            _require_same(name, state[name], getattr(self, name))
        self.coefficient = state["coefficient"]


class FixedController:
    """Keeps the price as it is. coefficient: reward per nat, >= 0."""

    stop_at: float | None = None

    def __init__(self, coefficient: float) -> None:
        _require("coefficient", coefficient, coefficient >= 0, "a number of at least 0")
        self.coefficient = coefficient

    def update(self, kl: float, n: int) -> None:
        """Do nothing: here only so that callers need not know which controller they hold."""

    def state_dict(self) -> dict[str, float]:
        """Give the price, to be compared."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Check a `state_dict`. Raises CheckpointError for missing or unknown keys, or another coefficient."""
        _require_keys(state, ("coefficient",))
        _require_same("coefficient", state["coefficient"], self.coefficient)


class StoppingController:
    """Keeps the price as it is, and lets training end where the KL has reached its target.

    coefficient: reward per nat, >= 0. target: nats per response, > 0. What may be spent is said in nats, not as a price
    of which nobody knows where it leads. Source: early stopping on KL, as Gao et al. 2023, "Scaling laws for reward
    model overoptimization", compare policies at equal KL.
    """

    def __init__(self, coefficient: float, target: float) -> None:
        _require("coefficient", coefficient, coefficient >= 0, "a number of at least 0")
        _require("target", target, target > 0, "a number above 0")
        self.coefficient = coefficient
        self.stop_at: float | None = target

    def update(self, kl: float, n: int) -> None:
        """Do nothing: whoever samples looks at `stop_at`."""

    def state_dict(self) -> dict[str, float]:
        """Give price and target, to be compared."""
        assert self.stop_at is not None, "a target that was taken away"
        return {"coefficient": self.coefficient, "target": self.stop_at}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Check a `state_dict`. Raises CheckpointError for missing or unknown keys, or another price or target."""
        _require_keys(state, ("coefficient", "target"))
        for name, given in self.state_dict().items():
            _require_same(name, state[name], given)


def _require(name: str, number: float, allowed: bool, what: str) -> None:
    if not (allowed and math.isfinite(number)):
        raise ValueError(f"the KL controller's {name} is {number}, allowed is {what}")


def _require_keys(state: Mapping[str, float], names: tuple[str, ...]) -> None:
    if set(state) != set(names):
        missing, unknown = sorted(set(names) - set(state)), sorted(set(state) - set(names))
        raise CheckpointError(
            f"the KL controller's state lacks {missing} and has unknown {unknown}: the checkpoint was made with "
            "other KL settings or another version; start the stage again from its beginning"
        )


def _require_same(name: str, saved: float, given: float) -> None:
    if saved != given:
        raise CheckpointError(
            f"the checkpoint was made with KL {name} {saved}, now it is {given}: "
            "set it back, or start under another name"
        )
