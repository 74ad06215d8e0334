"""Dated votes: what Votes.xml says of each answer, day by day.

Every vote up (kind 2) and down (kind 3) stands there with its day; their sum is the answer's Score. So two answers can
be compared by the votes that both could have had.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache

CHANGES = {"2": 1, "3": -1}
"""What a vote of each kind changes; other kinds (accepted, favourite, close, ...) are no judgement of the text."""

Ballots = Sequence[tuple[int, int]]
"""The votes of an answer: (day, counted from 1970-01-01; how many more were up than down on it), in order of the days."""


def parse_vote(row: Mapping[str, str]) -> tuple[int, int, int] | str | None:
    """(post, day, change) of a row of Votes, None for one of another kind, or the reason why there is none."""
    change = CHANGES.get(row.get("VoteTypeId", ""))
    if change is None:
        return None
    post, day = row.get("PostId", ""), day_number(row.get("CreationDate", ""))
    if not (post.isascii() and post.isdigit() and len(post) <= 18):
        return "vote: no PostId, or not a whole number"
    return "vote: no CreationDate, or not a date" if day is None else (int(post), day, change)


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


def votes_between(ballots: Ballots, first: int, end: int) -> int:
    """How many more votes were up than down from the day `first` to before the day `end`."""
    return sum(change for _, change in ballots[bisect_left(ballots, (first,)) : bisect_left(ballots, (end,))])
