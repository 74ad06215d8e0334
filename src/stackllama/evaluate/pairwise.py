"""From the verdicts of a judge who reads to win rates, and to how far that judge is to be trusted.

Every comparison is asked in both orders, since such judges prefer a place (Zheng et al. 2023, "Judging LLM-as-a-judge
with MT-Bench and Chatbot Arena", table 2: GPT-4 held to its verdict in 65% of swapped pairs, others in 24% to 46%). It
is won, or lost, only where both orders say so. So a taste for a place favours neither side; what a judge likes in both
places stays: length, manner, answers like its own.

Legend: Q comparisons that were read, one for each question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stackllama.evaluate.statistics import Interval, Resampling, flat, interval, length_controlled

SCORES = ("judge", "reward", "gold")
"""What a judge is held against: the run's own judge, the training reward model, the truth where there is one."""

_POLICY_FIRST = {"A": 1, "B": -1, "C": 0}
_FIRST_PLACE = {"A": 1.0, "B": 0.0}


@dataclass(frozen=True, slots=True)
class Compared:
    """What a judge said of a policy's answer beside the SFT model's to one question.

    straight: the verdict where the policy's answer is A, swapped: where it is B; `A`, `B`, `C` for a tie, None for a
    reply that could not be read. equal: the answers are the same text, so nothing was asked. longer: characters of the
    policy's answer minus those of the other. scores: name in SCORES -> score of the policy's answer minus the other's.
    """

    straight: str | None
    swapped: str | None
    equal: bool
    longer: int
    scores: Mapping[str, float]

    @property
    def readable(self) -> bool:
        """Whether there is an outcome: both orders were read, or nothing was to be asked."""
        return self.equal or (self.straight is not None and self.swapped is not None)


def sides(one: Compared) -> tuple[int, int]:
    """What each order says of the policy's answer: 1 better, -1 worse, 0 a tie. For what was asked and read."""
    assert one.straight is not None
    assert one.swapped is not None
    return _POLICY_FIRST[one.straight], -_POLICY_FIRST[one.swapped]


def win(one: Compared) -> float:
    """1 where both orders prefer the policy's answer, 0 where both prefer the other, else one half. For what is
    readable.
    """
    if one.equal:
        return 0.5
    straight, swapped = sides(one)
    return 0.5 + straight / 2 if straight == swapped else 0.5


def numbers(compared: Sequence[Compared], how: Resampling) -> dict[str, Any]:
    """All that judge.json says of one policy; docs/metrics.md defines each. What fewer than two questions speak of
    is None.
    """
    read = [one for one in compared if one.readable]
    asked = [one for one in read if not one.equal]
    wins_Q = np.array([win(one) for one in read])
    longer_Q = np.array([one.longer for one in read], dtype=np.float64)
    moved = [float(len(set(sides(one))) > 1) for one in asked]
    even = length_controlled(wins_Q, longer_Q, **how) if len(read) > 1 else None
    return {
        "questions": len(read),
        "equal": len(read) - len(asked),
        "unreadable": len(compared) - len(read),
        "won": int((wins_Q == 1).sum()),
        "lost": int((wins_Q == 0).sum()),
        **_flat("win_rate", _interval(wins_Q, how)),
        **_flat("win_rate_length_controlled", even),
        **_flat("disagreement", _interval(moved, how)),
        **_flat("first_place", _interval(_first_places(asked), how)),
        "agreement": {name: _agreement(read, name, how) for name in SCORES if any(name in one.scores for one in read)},
    }


def _first_places(asked: Sequence[Compared]) -> list[float]:
    """By question, the share of the verdicts that name a winner which name the first; of questions with such a one."""
    found = []
    for one in asked:
        places = [_FIRST_PLACE[said] for said in (one.straight, one.swapped) if said in _FIRST_PLACE]
        if places:
            found.append(sum(places) / len(places))
    return found


def _agreement(read: Sequence[Compared], name: str, how: Resampling) -> dict[str, float | int | None]:
    """The share of questions where a score prefers the same answer, of those where both prefer one."""
    signs = [(win(one) - 0.5, one.scores[name]) for one in read if name in one.scores]
    same = [float((mine > 0) == (theirs > 0)) for mine, theirs in signs if mine and theirs]
    return {"questions": len(same), **_flat("share", _interval(same, how))}


def _interval(values: npt.ArrayLike, how: Resampling) -> Interval | None:
    return interval(values, **how) if np.size(values) > 1 else None


def _flat(name: str, found: Interval | None) -> dict[str, float | None]:
    if found is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {**flat(name, found)}
