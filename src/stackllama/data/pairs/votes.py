"""Dated votes: what Votes.xml says of each answer, day by day.

Every vote up (kind 2) and down (kind 3) stands there with its day; their sum is the answer's Score. So two answers can
be compared by the votes that both could have had.

Legend: A answers, V days with votes (each of one answer), P pairs.
"""

from __future__ import annotations

from datetime import date
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CHANGES = {"2": 1, "3": -1}
"""What a vote of each kind changes; other kinds (accepted, favourite, close, ...) are no judgement of the text."""

Numbers = NDArray[np.int64]


def day_number(moment: str) -> int | None:
    """The day of an ISO date or moment ("2019-05-01T10:00:00.000"), counted from 1970-01-01; None for no such thing."""
    return _day(moment[:10])


@lru_cache(maxsize=20_000)  # 50 years of days
def _day(text: str) -> int | None:
    try:
        return date.fromisoformat(text).toordinal() - _EPOCH
    except ValueError:
        return None


_EPOCH = date(1970, 1, 1).toordinal()
_DAYS = 1 << 23
"""More days than any date has, counted from 0001-01-01 on: what keeps the days of two answers apart in one number."""


class Ballots:
    """The dated votes of answers, for sums over days.

    `answer_V` says whose votes a day has (a number from 0), `day_V` the day, `change_V` how many more votes were up
    than down. `votes_A` are the answers' scores: where the days do not add up to it, something is missing, and the
    answer is not `dated_A`.
    """

    def __init__(self, answer_V: Numbers, day_V: Numbers, change_V: Numbers, votes_A: Numbers) -> None:
        at_V = answer_V.astype(np.int64) * _DAYS + day_V + _EPOCH
        order_V = np.argsort(at_V, kind="stable")
        self._at_V = at_V[order_V]
        self._sum_V1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(change_V[order_V], dtype=np.int64)])
        self.dated_A = self.since(np.arange(len(votes_A)), np.full(len(votes_A), -_EPOCH)) == votes_A

    def since(self, answer_P: Numbers, day_P: Numbers) -> Numbers:
        """How many more votes of each answer were up than down, from a day on."""
        start_P = np.searchsorted(self._at_V, answer_P * _DAYS + np.maximum(day_P + _EPOCH, 0))
        sums: Numbers = self._sum_V1[np.searchsorted(self._at_V, (answer_P + 1) * _DAYS)] - self._sum_V1[start_P]
        return sums
