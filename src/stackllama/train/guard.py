"""The guard: which steps must not change the weights, how far a step may move them, and when to go back.

A number that is not finite, or over a fixed limit, refuses its step. The numbers in `WATCHED` are also compared with
the last accepted ones of the same run, by median and median absolute deviation, which a few odd values do not move. On
each number's own scale only up is bad, and a distance is counted in robust deviations:

- a gradient beyond ``clip`` of them is scaled down to that bound, which lies below the recipe's own where steps are
  usually small;
- a number beyond ``skip`` of them refuses its step: weights and the optimizer's moments stay as they are;
- steps in a row that are refused, or whose loss or KL stays beyond ``clip``, say that the weights are damaged: then the
  loop goes back to the newest checkpoint that a usual step has proved good, and on with the next batch.

A gradient norm alone never leads back, and refuses two steps in a row at most: where it stays large while the loss is
usual, learning has come to a steeper place. Clipped steps lead on until the window has learnt the new norm.

Source: median and MAD as estimates of place and scale, Hampel 1974, "The influence curve and its role in robust
estimation"; gradients clipped by their own history, Seetharaman et al. 2020, "AutoClip". Left out on purpose: alarms
about slow drifts such as a reward that is gamed, and noise in labels, which no single step shows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

TO_SIGMA = 1.4826
"""Standard deviation of normal noise over its median absolute deviation."""
REFUSED, HIGH = 2, 1
"""What a step counts towards going back: refused, or accepted with a loss or KL beyond ``clip``."""
NORM_PATIENCE = 2
"""Steps in a row that a gradient norm alone refuses."""
SMALLEST = 1e-8
"""Norms below are no gradient, and say nothing about the usual one."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How the guard compares. window and warmup: accepted steps that are remembered, and that are needed before
    anything is compared; clip and skip: robust deviations above the median; rewind_after: refused steps in a row that
    lead back; rewinds: how often at most, 0 for never.
    """

    window: int
    warmup: int
    clip: float
    skip: float
    rewind_after: int
    rewinds: int


@dataclass(frozen=True, slots=True)
class Watch:
    """How a number is compared: on which scale, and back from it; the smallest and the largest deviation that is
    believed on that scale, the smallest also as a share of the median. window, warmup: instead of the guard's own, for
    a number that stands in many steps and counts once.
    """

    scale: Callable[[float], float]
    back: Callable[[float], float]
    least: float
    share: float = 0.0
    most: float = math.inf
    window: int | None = None
    warmup: int | None = None


def _same(value: float) -> float:
    return value


def _logarithm(value: float) -> float:
    return math.log(max(value, SMALLEST))


def _log_distance(ratio: float) -> float:
    return abs(_logarithm(ratio))


NORM = "gradient_norm"
WATCHED: Mapping[str, Watch] = {
    # Losses count in nats or the like. Refused, at 12 deviations, is nothing below twice the median or 0.5 above it:
    # PPO's loss has the tails of its value loss.
    "loss": Watch(_same, _same, least=0.04, share=1 / 12),
    # Clipped, at 8 deviations, from 4.6 to 10 times the median on, refused from 10 to 30 times. Without a largest
    # deviation, a norm whose logarithm scatters by 0.5 could grow 400 times unnoticed.
    NORM: Watch(_logarithm, math.exp, least=0.19, most=0.285),
    # Its mean over samples of the old policy is 1: one far below that tells as much as one far above.
    "ratio_mean": Watch(_log_distance, math.exp, least=0.075),
    "approximate_kl": Watch(_same, _same, least=0.04),
    # One value a round. It rises to its target first, so nothing is refused within 9 nats of the median.
    "kl": Watch(_same, _same, least=0.75, window=20, warmup=8),
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the guard says of a step. refusal: why it must not be applied, in words for the log, or None; action:
    "skipped", "clipped" or None; metric, value: the number that is out of range; usual, limit: the median of the
    window and the bound that was passed, where there are any.
    """

    refusal: str | None = None
    action: str | None = None
    metric: str | None = None
    value: float | None = None
    usual: float | None = None
    limit: float | None = None


class Guard:
    """Judges each step of a stage.

    limits: the largest value allowed for a metric by name, such as ``{"ratio_mean": 10.0}``, from the first step on.
    sensitivity: None compares nothing with the past; then only these limits and numbers that are not finite count.
    """

    def __init__(self, limits: Mapping[str, float] | None = None, sensitivity: Sensitivity | None = None) -> None:
        self._limits = dict(limits or {})
        self._how = sensitivity
        self._windows = {name: _Window(watch, sensitivity) for name, watch in WATCHED.items()}
        self._strikes = 0
        self._since = 0
        self._norm_run = 0
        self._rewinds = 0
        self._rewound = [0, 0]
        self._phase = 0

    def enter(self, phase: int) -> None:
        """Hear which phase the next step is of: with another than the last, what was usual is forgotten."""
        if phase != self._phase:
            self._phase, self._norm_run = phase, 0
            for window in self._windows.values():
                window.load((), None)

    def clip_bound(self, clip_norm: float) -> float:
        """The largest norm of the next gradient: the recipe's, or the usual range's upper end where that is less."""
        bound = None if self._how is None else self._windows[NORM].bound(self._how.clip)
        return clip_norm if bound is None else min(clip_norm, bound)

    def judge(
        self,
        step: int,
        *,
        loss: float,
        gradient_norm: float,
        metrics: Mapping[str, float],
        notes: Mapping[str, float],
        clipped_at: float | None = None,
    ) -> Judgement:
        """Judge a step, and remember its numbers if it is accepted.

        notes: numbers about the batch, of which those in `WATCHED` count; clipped_at: the bound that the gradient was
        scaled down to, where that was not the recipe's own.
        """
        seen = {"loss": loss, NORM: gradient_norm, **metrics}
        watched = {name: value for name, value in {**notes, **seen}.items() if name in WATCHED}
        found = self._impossible({**watched, **seen}) or self._far(watched)
        if found is not None:
            if found.metric != NORM or not math.isfinite(gradient_norm):
                self._strike(step, REFUSED)
            return found
        usual = self._windows[NORM].middle()
        high = self._remember(step, watched)
        if clipped_at is not None and gradient_norm > clipped_at:
            return Judgement(None, "clipped", NORM, gradient_norm, usual, clipped_at)
        return high

    @property
    def lost(self) -> bool:
        """Whether the weights are to be taken back to an earlier step."""
        return self._how is not None and self._how.rewinds > 0 and self._strikes >= REFUSED * self._how.rewind_after

    @property
    def doubts(self) -> bool:
        """Whether the last steps were not usual, so that weights should not be kept as good ones."""
        return self._how is not None and self._strikes > 0

    @property
    def rewinds_left(self) -> int:
        """How often the loop may still go back."""
        return 0 if self._how is None else self._how.rewinds - self._rewinds

    @property
    def good_before(self) -> int:
        """Weights of an earlier step than this are good.

        The step behind them read them and was usual. If already the first step after going back was not, then what it
        went back to was damaged as well.
        """
        unproved, target = self._rewound
        return target if unproved and unproved == self._since - 1 else self._since - 1

    def rewound(self, step: int, target: int, state: Mapping[str, Any]) -> None:
        """Hear that after ``step`` the weights of step ``target`` are in place; ``state`` is this guard's of then."""
        self._load_windows(state)
        self._strikes = self._norm_run = 0
        self._rewinds += 1
        self._rewound = [step, target]

    def state_dict(self) -> dict[str, Any]:
        """The windows and the counters, as JSON values."""
        return {
            "windows": {name: {"values": list(one.values), "last": one.last} for name, one in self._windows.items()},
            "strikes": self._strikes,
            "since": self._since,
            "norm_run": self._norm_run,
            "rewinds": self._rewinds,
            "rewound": list(self._rewound),
            "phase": self._phase,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._load_windows(state)
        self._strikes, self._since, self._norm_run = state["strikes"], state["since"], state["norm_run"]
        self._rewinds, self._rewound = state["rewinds"], list(state["rewound"])

    def _load_windows(self, state: Mapping[str, Any]) -> None:
        self._phase = state["phase"]
        for name, window in self._windows.items():
            saved = state["windows"][name]
            window.load(saved["values"], saved["last"])

    def _impossible(self, seen: Mapping[str, float]) -> Judgement | None:
        """A number that is not finite or over its fixed limit."""
        for name, value in seen.items():
            if not math.isfinite(value):
                usual = self._windows[name].middle() if name in self._windows else None
                return Judgement(f"{name} is {value}", "skipped", name, value, usual)
        for name, limit in self._limits.items():
            if name in seen and seen[name] > limit:
                value = seen[name]
                return Judgement(f"{name} {value:.3g} is over {limit:g}", "skipped", name, value, None, limit)
        return None

    def _far(self, watched: Mapping[str, float]) -> Judgement | None:
        """The number that lies farthest out, where that is too far; the gradient norm only if no other does."""
        if self._how is None:
            return None
        distances = {name: self._windows[name].distance(value) for name, value in watched.items()}
        norm = distances.pop(NORM, -math.inf)
        name = max(distances, key=lambda each: distances[each])
        if distances[name] > self._how.skip:
            return self._refused(name, watched[name])
        self._norm_run = self._norm_run + 1 if norm > self._how.skip else 0
        return self._refused(NORM, watched[NORM]) if 0 < self._norm_run <= NORM_PATIENCE else None

    def _refused(self, name: str, value: float) -> Judgement:
        assert self._how is not None
        usual, limit = self._windows[name].middle(), self._windows[name].bound(self._how.skip)
        words = f"{name} {value:.3g} is far from the usual {usual:.3g} (the limit is {limit:.3g})"
        return Judgement(words, "skipped", name, value, usual, limit)

    def _remember(self, step: int, watched: Mapping[str, float]) -> Judgement:
        """Take the numbers of an accepted step into the windows; count it where one of them is still high."""
        high = Judgement()
        if self._how is None:
            return high
        fresh = False
        for name, value in watched.items():
            window = self._windows[name]
            if name != NORM and window.distance(value) > self._how.clip:
                fresh = fresh or window.is_new(value)
                high = Judgement(None, None, name, value, window.middle(), window.bound(self._how.clip))
            window.take(value)
        if fresh:
            self._strike(step, HIGH)
        elif high.metric is None:  # a number of the whole round that stays high neither counts again nor is forgiven
            self._strikes = 0
        return high

    def _strike(self, step: int, weight: int) -> None:
        if self._strikes == 0:
            self._since = step
        self._strikes += weight


class _Window:
    """The last accepted values of one number, on its scale."""

    def __init__(self, watch: Watch, how: Sensitivity | None) -> None:
        self._watch = watch
        self._once = watch.window is not None
        self._warmup = watch.warmup or (0 if how is None else how.warmup)
        self.values: deque[float] = deque(maxlen=watch.window or (0 if how is None else how.window))
        self.last: float | None = None
        self._usual: tuple[float, float] | None = None

    def load(self, values: Sequence[float], last: float | None) -> None:
        """Remember other values instead, oldest first, given on the scale."""
        self.values = deque(values, self.values.maxlen)
        self.last = last
        self._usual = self._measured()

    def is_new(self, value: float) -> bool:
        """Whether it counts: a number of a whole round stands in many steps."""
        return not self._once or value != self.last

    def take(self, value: float) -> None:
        """Remember a value."""
        if self.is_new(value) and not (self._watch.scale is _logarithm and value < SMALLEST):
            self.values.append(self._watch.scale(value))
            self._usual = self._measured()
        self.last = value

    def _measured(self) -> tuple[float, float] | None:
        """Median and robust deviation on the scale; None while too few values are known."""
        if not self.values or len(self.values) < self._warmup:
            return None
        middle = median(self.values)
        spread = TO_SIGMA * median(abs(value - middle) for value in self.values)
        return middle, min(max(spread, self._watch.least, self._watch.share * abs(middle)), self._watch.most)

    def middle(self) -> float | None:
        """The median, in the number's own unit."""
        return None if self._usual is None else self._watch.back(self._usual[0])

    def bound(self, deviations: float) -> float | None:
        """The value so many deviations above the median."""
        usual = self._usual
        return None if usual is None else self._watch.back(usual[0] + deviations * usual[1])

    def distance(self, value: float) -> float:
        """Robust deviations above the median; 0 while too few values are known."""
        usual = self._usual
        return 0.0 if usual is None else (self._watch.scale(value) - usual[0]) / usual[1]
