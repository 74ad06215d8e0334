"""Which of two answers is better: the rules to choose from, the score rule of the original data, and the two baselines
to beat.

Legend: P pairs of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stackllama.data.posts import Answer, Pair, Question

KEPT = "pairs kept"
TIED = "pair: tied score"
OVER_LIMIT = "pair: over the limit of pairs a question"
ONE_ANSWER = "question: fewer than two answers"
ALL_TIED = "question: all answers tied"


@dataclass(frozen=True, slots=True)
class PairRules:
    """What makes two answers a pair (docs/preferences.md has the reasons and what each rule does to the baselines).

    As it stands, without arguments, this is the rule of the original data.

    score: "log2", `answer_score`; or "votes", the votes themselves, which know no accepted mark.
    conflict: where the accepted answer has fewer votes than the other: the "score" decides, the "votes", the
        "accepted" mark, or the pair is left out ("drop").
    time: "since_later" judges by the votes since the day on which the later answer was posted, where all votes of a
        question are dated, and leaves out `skip_days` after it; "off" by all votes.
    posted_within_days: the most days between two answers whose votes are not dated; None for any.
    min_gap, min_votes: the least difference of the scores, and the fewest votes of the better answer.
    margin: how far apart a reward model should put the answers, in reward, for each point between their scores.
    length_ratio: how many times as long as the shorter one the longer may be; None for any.
    near_copies: the resemblance from which on two texts are too much the same (`pairing.resemblance`); None for any.
    max_pairs: the most pairs of a question.
    weight: what a question counts for in training a reward model: all the same ("equal"), as much as it has "pairs",
        or log2(1 + the votes of its answers) ("votes"). Where pairs were stated, answers have pseudo-votes,
        2**score - 1: then "votes" counts the question by about its best score.
    """

    score: Literal["log2", "votes"] = "log2"
    conflict: Literal["score", "votes", "accepted", "drop"] = "score"
    time: Literal["off", "since_later"] = "off"
    skip_days: int = 0
    posted_within_days: int | None = None
    min_gap: int = 1
    min_votes: int | None = None
    margin: float = 0.0
    length_ratio: float | None = None
    near_copies: float | None = None
    max_pairs: int = 10
    weight: Literal["equal", "pairs", "votes"] = "equal"


def answer_score(votes: int, accepted: bool) -> int:
    """round(log2(1 + votes)), one more for the accepted answer; -1 if votes are negative, accepted or not.

    The rule of `HuggingFaceH4/stack-exchange-preferences`, in whole numbers so that no float rounds it: with n = 1 +
    votes, k is the nearest whole number to log2(n) just when 2**(2k-1) <= n*n < 2**(2k+1), which is half the bit length
    of n*n. How Python rounds halves (to even) never matters: log2(n) = k + 1/2 would mean n*n = 2**(2k+1), and an odd
    power of two is no square.
    """
    if votes < 0:
        return -1
    return ((1 + votes) ** 2).bit_length() // 2 + int(accepted)


def scores_by(votes: NDArray[np.int64], accepted: NDArray[np.bool_], score: str) -> NDArray[np.int64]:
    """The score of each answer under a rule of `PairRules`; for "log2" just what `answer_score` gives."""
    if score == "votes":
        return votes
    # The square of up to 2**26 is a whole number to a float, whose exponent is then the length in bits.
    exponent = np.frexp((1.0 + votes.clip(0, 1 << 26)) ** 2)[1] // 2
    found = np.where(votes < 0, -1, exponent.astype(np.int64) + accepted)
    for at in np.argwhere(votes >= 1 << 26).tolist():
        found[tuple(at)] = answer_score(int(votes[tuple(at)]), bool(accepted[tuple(at)]))
    return found


def pairs_by(scores: Sequence[int]) -> list[Pair]:
    """Every pair of positions whose scores differ, in the order of the positions."""
    pairs = []
    for first, second in combinations(range(len(scores)), 2):
        gap = scores[first] - scores[second]
        if gap:
            pairs.append(Pair(first, second, gap) if gap > 0 else Pair(second, first, -gap))
    return pairs


def shown_length(answer: Answer) -> int:
    """The length of an answer in characters as a reader sees it."""
    return len(answer.text) if answer.length is None else answer.length


def longer_wins(question: Question, pair: Pair) -> float:
    """1 if the longer answer is the better one of the pair, 0 if the shorter is, one half if they are equally long."""
    return _wins(shown_length(question.answers[pair.better]), shown_length(question.answers[pair.worse]))


def earlier_wins(question: Question, pair: Pair) -> float:
    """1 if the earlier answer is the better one of the pair, 0 if the later is, one half if they are equally old."""
    # ISO dates of one form sort like the times they stand for.
    return _wins(question.answers[pair.worse].date, question.answers[pair.better].date)


def _wins(larger: int | str, smaller: int | str) -> float:
    assert isinstance(larger, type(smaller))
    return 0.5 if larger == smaller else float(larger > smaller)  # type: ignore[operator]
