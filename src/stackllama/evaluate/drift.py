"""Where the scores of a policy's answers lie among those of people's answers, which the reward model learned from.

A policy is trained to be scored high, and ends where people seldom are: there the reward model guesses (Gao et al.
2023, "Scaling laws for reward model overoptimization"). How far it has come is told by the judge's scores beside it,
which no policy was trained to raise.

Legend: A people's answers, S answers of a policy, one for each question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stackllama.errors import DataError
from stackllama.evaluate.statistics import Interval, Resampling, interval

Floats = NDArray[np.float64]
Owners = NDArray[np.int64]

PEOPLE = "people"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TOP = QUANTILES[-1]


@dataclass(frozen=True, slots=True)
class Spread:
    """How scores are distributed. quantiles: at `QUANTILES`; shift: mean less that of people's answers, in deviations
    of theirs, None where they have none; beyond: share above the highest quantile of people's answers (0.05 would be
    alike), with its interval over questions, None for people themselves.
    """

    mean: float
    deviation: float
    quantiles: tuple[float, ...]
    shift: float | None
    beyond: Interval | None


def spreads(people_A: Floats, question_A: Owners, answered: Mapping[str, Floats], how: Resampling) -> dict[str, Spread]:
    """Name -> spread of the scores, by one scorer, of people's answers (`PEOPLE`) and of each policy's (S,).

    question_A: the question of each of people's answers; questions weigh the same, however many answers they have. The
    limit that a policy's scores are beyond is taken as known: its own chance is not in the interval.

    Raises:
        DataError: without people's answers.
    """
    if len(people_A) == 0:
        raise DataError("no question of the exam has answers of people that fit the limits of the reward model")
    place_A = np.unique(question_A, return_inverse=True)[1].reshape(-1)
    weight_A = 1.0 / np.bincount(place_A)[place_A]
    mean = float(np.average(people_A, weights=weight_A))
    deviation = float(np.sqrt(np.average((people_A - mean) ** 2, weights=weight_A)))
    limits = tuple(float(np.quantile(people_A, share, weights=weight_A, method="inverted_cdf")) for share in QUANTILES)
    found = {PEOPLE: Spread(mean, deviation, limits, 0.0 if deviation else None, None)}
    for name, score_S in answered.items():
        found[name] = Spread(
            float(score_S.mean()),
            float(score_S.std()),
            tuple(float(value) for value in np.quantile(score_S, QUANTILES, method="inverted_cdf")),
            (float(score_S.mean()) - mean) / deviation if deviation else None,
            interval((score_S > limits[-1]).astype(np.float64), **how),
        )
    return found
