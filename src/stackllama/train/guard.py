"""The guard: which steps must not change the weights.

A loss, gradient or metric that is not finite is never applied; PPO also refuses a minibatch whose mean probability
ratio is over a limit (the fix that followed StackLLaMA's loss spikes). Watching trends and rewinding is left to later
work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


class Guard:
    """Says why a step is refused, or None.

    limits: the largest value allowed for a metric by name, such as ``{"ratio_mean": 10.0}``.
    """

    def __init__(self, limits: Mapping[str, float] | None = None) -> None:
        self._limits = dict(limits or {})

    def refusal(self, *, loss: float, gradient_norm: float, metrics: Mapping[str, float]) -> str | None:
        """The reason to skip the step, in words for the log."""
        seen = {"loss": loss, "gradient_norm": gradient_norm, **metrics}
        for name, value in seen.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        for name, limit in self._limits.items():
            if name in metrics and metrics[name] > limit:
                return f"{name} {metrics[name]:.3g} is over {limit:g}"
        return None
