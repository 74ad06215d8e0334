"""Scores as PPO is to see them: brought to one scale, by how widely all scores of a run spread, and then clipped.

S: responses of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from stackllama.errors import CheckpointError, TrainingError

SMALLEST_SPREAD = 1e-3
"""Deviation, in reward, below which scores are left as they are: to a pairwise loss such scores are a coin flip, and
their differences may be rounding, which division by them would blow up."""


class RunningDeviation:
    """Deviation of all scores so far (of the population: divided by their number), in float64.

    Batches are joined by their counts, means and sums of squares, so it does not matter how scores fall into batches.
    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance". For scores of a reward model:
    trl (`use_score_scaling`), where the mean is kept too, as here.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean

    @property
    def scale(self) -> float:
        """What scores are to be divided by, in reward; 1 until they spread."""
        deviation = math.sqrt(self._squares / self._count) if self._count else 0.0
        return deviation if deviation >= SMALLEST_SPREAD else 1.0

    def update(self, score_S: Tensor) -> None:
        """Take in the scores (S,) of a batch. Raises TrainingError for one that is not finite."""
        score64_S = score_S.double()
        count, mean = len(score64_S), float(score64_S.mean())
        squares = float((score64_S - mean).square().sum())
        if not math.isfinite(squares):
            raise TrainingError(f"of {count} scores of the reward model some are not finite: train it again")
        total, away = self._count + count, mean - self._mean
        self._squares += squares + away**2 * self._count * count / total
        self._mean += away * count / total
        self._count = total

    def state_dict(self) -> dict[str, float]:
        """Give what a resumed run needs."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict`. Raises CheckpointError for missing or unknown keys."""
        if set(state) != {"count", "mean", "squares"}:
            raise CheckpointError(f"the spread of scores has the keys {sorted(state)}, needed are count, mean, squares")
        self._count, self._mean, self._squares = int(state["count"]), state["mean"], state["squares"]


class ScoreShaping:
    """Scales scores by the deviation of all so far, if ``scaling``; then cuts them to the size ``clip`` (in reward, or
    once scaled in deviations), unless that is None. Source: trl (`use_score_scaling`, `score_clip`), in the same order.
    """

    def __init__(self, *, scaling: bool, clip: float | None) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}, allowed is a number above 0, or None")
        self._scaling = scaling
        self._clip = clip
        self._spread = RunningDeviation()

    def shape(self, score_S: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Give a batch's scores (S,) shaped, and what was done to them, for the log. Raises TrainingError where scores
        are to be scaled and one is not finite.
        """
        notes: dict[str, float] = {}
        if self._scaling:
            self._spread.update(score_S)  # first, so that no batch is scaled by a spread that it does not fit
            score_S = score_S / self._spread.scale
            notes |= {"reward_scale": self._spread.scale}
        if self._clip is not None:
            notes |= {"reward_clipped": float((score_S.abs() > self._clip).float().mean())}
            score_S = score_S.clamp(-self._clip, self._clip)
        return score_S, notes

    def state_dict(self) -> dict[str, float]:
        """Give what a resumed run needs."""
        return self._spread.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict`. Raises CheckpointError for missing or unknown keys."""
        self._spread.load_state_dict(state)
