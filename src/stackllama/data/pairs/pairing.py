"""The pairs of many questions at a time: which two answers are compared, by which votes, and what is left out and why.

Each rule takes pairs away or leaves them alone, in a fixed order, and counts what it took under a name. Everything is
an array, since a large dump has more pairs than records would bear.

Legend: Q questions, A answers (question by question), P pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from stackllama.data.pairs.rules import (
    ALL_TIED,
    KEPT,
    ONE_ANSWER,
    OVER_LIMIT,
    TIED,
    PairRules,
    scores_by,
)
from stackllama.data.pairs.votes import Ballots, day_number
from stackllama.data.split.duplicates import SHORT, Texts

CONFLICT = "pair: the accepted answer has fewer votes"
SMALL_GAP = "pair: scores too close"
FEW_VOTES = "pair: the better answer has too few votes"
FAR_APART = "pair: posted too far apart"
UNEQUAL = "pair: lengths too different"
COPIES = "pair: nearly the same text"
CROWDED = "answer: beyond the most that are compared"
BY_DATED = "questions judged by the votes that both answers could have"
BY_ALL = "questions judged by all votes"

MOST_ANSWERS = 250
"""Answers of a question that are compared with each other; of more, a choice by a hash. The cost grows by the square:
0.5 s for a question of so many under all rules that are tallied, 8 s for one of 1000."""
_PAIRS_AT_ONCE = 1 << 20
_COMPARED_AT_ONCE = 1 << 14
_DOUBT = 0.2
"""How far the share of equal bins may fall below the resemblance of two texts: three standard errors of such a share,
which is sqrt(0.5 * 0.5 / 64) at most, and four at a resemblance of 0.8.
"""

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers as columns: those of question q are numbers `starts[q]` to `starts[q + 1]`, in the order of their ids.

    `keys` are (site, id) of the questions; `length_A` is what a reader sees, in characters; `ballots` has the dated
    votes, None where nobody asks for them.
    """

    keys: Sequence[tuple[str, int]]
    starts: Numbers
    id_A: Numbers
    votes_A: Numbers
    accepted_A: Flags
    date_A: Sequence[str]
    length_A: Numbers
    texts: Texts
    ballots: Ballots | None = None


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs as columns, sorted by question and places: `question_P`; places among the question's answers; gaps."""

    question_P: Numbers
    better_P: Numbers
    worse_P: Numbers
    gap_P: Numbers

    def __len__(self) -> int:
        return len(self.gap_P)

    def some(self, chosen_P: Flags | Numbers) -> Pairs:
        """Some of the pairs."""
        return Pairs(*(getattr(self, field.name)[chosen_P] for field in fields(self)))


def choose(answers: Answers, rules: PairRules, asked_Q: Flags | None = None) -> tuple[Pairs, Counter[str]]:
    """The pairs of all questions (or of those `asked_Q`) under the rules; and how many there are, were left out or
    judged how, by name.
    """
    counts: Counter[str] = Counter()
    size_Q = np.diff(answers.starts)
    asked_Q = np.ones(len(size_Q), bool) if asked_Q is None else asked_Q
    counts[ONE_ANSWER] = int((asked_Q & (size_Q < 2)).sum())
    dated_Q = _dated(answers, rules)
    chosen = merged(*(_choose(answers, rules, lot_Q, dated_Q, counts) for lot_Q in _lots(size_Q * asked_Q)))
    counts[KEPT] = len(chosen)
    return chosen, +counts


def merged(*lots: Pairs) -> Pairs:
    """The pairs of all lots in order."""
    every = Pairs(*(np.concatenate([getattr(lot, field.name) for lot in lots]) for field in fields(Pairs)))
    return every.some(np.lexsort([every.worse_P, every.better_P, every.question_P]))


def weigh(answers: Answers, pairs: Pairs, rule: str) -> NDArray[np.float64]:
    """What each question (Q,) counts for under the rule `PairRules.weight`; 1 for one without a pair."""
    weight_Q = np.ones(len(answers.keys))
    asked, first_P, size = np.unique(pairs.question_P, return_index=True, return_counts=True)
    if rule == "pairs":
        weight_Q[asked] = size
    elif rule == "votes" and len(first_P):
        votes_A1 = np.concatenate([[0], np.cumsum(np.maximum(answers.votes_A, 0))])
        votes_Q = votes_A1[answers.starts[1:]] - votes_A1[answers.starts[:-1]]
        weight_Q[asked] = np.log2(1.0 + np.maximum(votes_Q[asked], 1))  # at least one vote made it a pair
    return weight_Q


def no_pairs(questions: int, counts: Counter[str]) -> str:
    """What to tell a user whose data have no pair at all."""
    told = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()) if count) or "none at all"
    return (
        f"no usable pair of answers in {questions} questions ({told}); give a site where questions have two or more "
        "answers with differing votes, or loosen data.preferences"
    )


def _dated(answers: Answers, rules: PairRules) -> Flags:
    """The questions whose answers' votes are all dated, so that the time correction is exact."""
    if answers.ballots is None or rules.time == "off":
        return np.zeros(len(answers.keys), bool)
    missing_A1 = np.concatenate([[0], np.cumsum(~answers.ballots.dated_A)])
    voted_A1 = np.concatenate([[0], np.cumsum(answers.votes_A != 0)])
    whole, voted = (sums[answers.starts[1:]] - sums[answers.starts[:-1]] for sums in (missing_A1, voted_A1))
    dated: Flags = (whole == 0) & (voted > 0)
    return dated


def _lots(size_Q: Numbers) -> Iterator[Numbers]:
    """The questions with two answers or more, in lots of about `_PAIRS_AT_ONCE` pairs; one lot at least."""
    asked_Q = np.flatnonzero(size_Q > 1)
    compared = np.minimum(size_Q[asked_Q], MOST_ANSWERS)
    lot_Q = np.cumsum(compared * (compared - 1) // 2) // _PAIRS_AT_ONCE
    yield from np.split(asked_Q, np.flatnonzero(np.diff(lot_Q)) + 1)


def _choose(answers: Answers, rules: PairRules, lot_Q: Numbers, dated_Q: Flags, counts: Counter[str]) -> Pairs:
    """The pairs of some questions."""
    question_P, one_P, other_P = _every_two(answers, lot_Q, counts)
    votes_P2 = _votes(answers, rules, question_P, one_P, other_P, dated_Q)
    accepted_P2 = np.stack([answers.accepted_A[one_P], answers.accepted_A[other_P]], axis=1)
    lead_P, conflict_P = _lead(votes_P2, accepted_P2, rules)
    better_P, worse_P = np.where(lead_P > 0, one_P, other_P), np.where(lead_P > 0, other_P, one_P)
    gap_P, best_P = np.abs(lead_P), np.where(lead_P > 0, votes_P2[:, 0], votes_P2[:, 1])
    start_P = answers.starts[question_P]
    pairs = Pairs(question_P, better_P - start_P, worse_P - start_P, gap_P)
    left_P = np.ones(len(pairs), bool)

    def leave_out(reason: str, wrong_P: Flags) -> None:
        counts[reason] += int((left_P & wrong_P).sum())
        np.logical_and(left_P, ~wrong_P, out=left_P)

    if rules.conflict == "drop":
        leave_out(CONFLICT, conflict_P)
    leave_out(TIED, gap_P == 0)
    counts[ALL_TIED] += len(lot_Q) - len(np.unique(question_P[gap_P > 0]))
    leave_out(SMALL_GAP, gap_P < rules.min_gap)
    if rules.min_votes is not None:
        leave_out(FEW_VOTES, best_P < rules.min_votes)
    if rules.posted_within_days is not None:
        apart_P = np.abs(_days(answers, one_P) - _days(answers, other_P))
        leave_out(FAR_APART, ~dated_Q[question_P] & (apart_P > rules.posted_within_days))
    if rules.length_ratio is not None:
        short_P, long_P = np.sort([answers.length_A[one_P], answers.length_A[other_P]], axis=0)
        leave_out(UNEQUAL, long_P > rules.length_ratio * short_P)
    if rules.near_copies is not None:
        leave_out(COPIES, _copies(answers, one_P, other_P, left_P, rules.near_copies))
    counts[BY_DATED] += int(dated_Q[lot_Q].sum())
    counts[BY_ALL] += int((~dated_Q[lot_Q]).sum())
    return _limited(answers, pairs.some(left_P), rules.max_pairs, counts)


def _every_two(answers: Answers, lot_Q: Numbers, counts: Counter[str]) -> tuple[Numbers, Numbers, Numbers]:
    """Every two answers of a question: the question, and the numbers of both, the first before the second."""
    start_Q, size_Q = answers.starts[lot_Q], np.diff(answers.starts)[lot_Q]
    parts: list[tuple[Numbers, Numbers, Numbers]] = []
    for size in np.unique(size_Q).tolist():
        mine_Q = np.flatnonzero(size_Q == size)
        one, other = np.triu_indices(min(size, MOST_ANSWERS), 1)
        places = np.tile(np.arange(min(size, MOST_ANSWERS)), (len(mine_Q), 1))
        if size > MOST_ANSWERS:
            counts[CROWDED] += len(mine_Q) * (size - MOST_ANSWERS)
            places = np.stack([_few(answers, question) for question in lot_Q[mine_Q].tolist()])
        number = start_Q[mine_Q][:, None] + places
        parts.append((np.repeat(lot_Q[mine_Q], len(one)), number[:, one].ravel(), number[:, other].ravel()))
    if not parts:
        return (np.zeros(0, np.int64),) * 3
    question_P, one_P, other_P = (np.concatenate(column) for column in zip(*parts, strict=True))
    return question_P, one_P, other_P


def _few(answers: Answers, question: int) -> Numbers:
    """The places of the answers that are compared, of a question with too many."""
    ids = answers.id_A[answers.starts[question] : answers.starts[question + 1]].tolist()
    order = sorted(range(len(ids)), key=lambda at: _key(answers.keys[question], ids[at], ids[at]))
    return np.sort(np.array(order[:MOST_ANSWERS], np.int64))


def _votes(
    answers: Answers, rules: PairRules, question_P: Numbers, one_P: Numbers, other_P: Numbers, dated_Q: Flags
) -> Numbers:
    """The votes (P, 2) by which the answers of each pair are judged: all, or those since the later one was there."""
    votes_P2 = np.stack([answers.votes_A[one_P], answers.votes_A[other_P]], axis=1)
    dated_P = np.flatnonzero(dated_Q[question_P])
    if len(dated_P):
        assert answers.ballots is not None
        sides = (one_P[dated_P], other_P[dated_P])
        first_P = np.maximum(*(_days(answers, side) for side in sides)) + rules.skip_days
        votes_P2[dated_P] = np.stack([answers.ballots.since(side, first_P) for side in sides], axis=1)
    return votes_P2


def _days(answers: Answers, number_P: Numbers) -> Numbers:
    """The day on which each answer was posted."""
    asked, place_P = np.unique(number_P, return_inverse=True)
    return np.array([day_number(answers.date_A[at]) or 0 for at in asked.tolist()], np.int64)[place_P]


def _lead(votes_P2: Numbers, accepted_P2: Flags, rules: PairRules) -> tuple[Numbers, Flags]:
    """By how much the first of each pair is better (negative: worse), and where votes and accepted mark disagree."""
    ahead_P = np.sign(votes_P2[:, 0] - votes_P2[:, 1])
    marked_P = accepted_P2[:, 0].astype(np.int64) - accepted_P2[:, 1]
    conflict_P = ahead_P * marked_P < 0
    score_P2 = scores_by(votes_P2, accepted_P2, rules.score)
    lead_P = score_P2[:, 0] - score_P2[:, 1]
    if rules.conflict == "votes":
        plain_P2 = scores_by(votes_P2, np.zeros_like(accepted_P2), rules.score)
        lead_P = np.where(conflict_P, plain_P2[:, 0] - plain_P2[:, 1], lead_P)
    elif rules.conflict == "accepted":
        lead_P = np.where(conflict_P, marked_P, lead_P)
    return lead_P, conflict_P


def _copies(answers: Answers, one_P: Numbers, other_P: Numbers, left_P: Flags, similar: float) -> Flags:
    """Which of the pairs that are left have nearly the same text: their word triples' Jaccard similarity says so.

    Signatures name the few pairs for which it is worked out. Texts of a few words are copies only where they are equal,
    and texts of which one is more than twice as long as the other are none.
    """
    found_P = np.zeros(len(one_P), bool)
    size_P2 = np.stack([answers.length_A[one_P], answers.length_A[other_P]], axis=1)
    near_P = np.flatnonzero(left_P & (size_P2.max(axis=1) <= 2 * size_P2.min(axis=1)))
    for start in range(0, len(near_P), _COMPARED_AT_ONCE):
        some_P = near_P[start : start + _COMPARED_AT_ONCE]
        one, other = (answers.texts.signatures(side[some_P]) for side in (one_P, other_P))
        likely = (one == other).mean(axis=1) >= similar - _DOUBT
        for at in some_P[likely].tolist():
            found_P[at] = resemblance(answers.texts[one_P[at]], answers.texts[other_P[at]]) >= similar
    return found_P


def resemblance(one: str, other: str) -> float:
    """How much two texts are the same: the Jaccard similarity of their sets of word triples, in lower case; texts of a
    few words are the same (1) or not (0).
    """
    words = [text.lower().split() for text in (one, other)]
    if min(map(len, words)) < SHORT:
        return float(words[0] == words[1])
    first, second = (set(zip(some, some[1:], some[2:], strict=False)) for some in words)
    return len(first & second) / len(first | second)


def _limited(answers: Answers, pairs: Pairs, most: int, counts: Counter[str]) -> Pairs:
    """At most so many pairs of a question.

    Which ones stay is decided by a hash of site, question and the two answers: the same in every run and whatever else
    is in the dump.
    """
    question, first_P, size = np.unique(pairs.question_P, return_inverse=True, return_counts=True)
    keep_P = size[first_P] <= most
    for at in np.flatnonzero(size > most).tolist():
        mine = np.flatnonzero(first_P == at)
        start = answers.starts[question[at]]
        ids = [answers.id_A[start + places[mine]].tolist() for places in (pairs.better_P, pairs.worse_P)]
        keys = [_key(answers.keys[question[at]], *both) for both in zip(*ids, strict=True)]
        keep_P[[mine[place] for place in sorted(range(len(mine)), key=keys.__getitem__)[:most]]] = True
    counts[OVER_LIMIT] += int((~keep_P).sum())
    return pairs.some(keep_P)


@lru_cache(maxsize=1 << 12)  # a bucket is limited again and again, once for each rule that is looked at
def _key(question: tuple[str, int], one: int, other: int) -> bytes:
    # The lower id comes first, whichever is better: a later vote does not reshuffle the choice.
    site, number = question
    return blake2b(f"{site}\0{number}\0{min(one, other)}\0{max(one, other)}".encode(), digest_size=16).digest()
