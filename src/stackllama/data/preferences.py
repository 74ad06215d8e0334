"""Which of two answers is better: the score rule of the original data, pairs, and the two baselines to beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import combinations

from stackllama.data.posts import Answer, Pair, Question
from stackllama.errors import DataError

KEPT = "pairs kept"
TIED = "pair: tied score"
OVER_LIMIT = "pair: over the limit of pairs a question"
ONE_ANSWER = "question: fewer than two answers"
ALL_TIED = "question: all answers tied"


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


def pairs_by(scores: Sequence[int]) -> list[Pair]:
    """Every pair of positions whose scores differ, in the order of the positions."""
    pairs = []
    for first, second in combinations(range(len(scores)), 2):
        gap = scores[first] - scores[second]
        if gap:
            pairs.append(Pair(first, second, gap) if gap > 0 else Pair(second, first, -gap))
    return pairs


def with_pairs(question: Question, *, max_pairs: int) -> tuple[Question, dict[str, int]]:
    """The question with at most `max_pairs` of its pairs, and how many were kept or dropped, by reason.

    Ties are dropped. Which pairs stay is decided by a hash of site, question and the two answers: the same in every run
    and whatever else is in the dump.
    """
    if max_pairs < 1:
        raise DataError(f"max_pairs is {max_pairs}; at least 1 pair a question is needed")
    answers = question.answers
    if len(answers) < 2:
        return replace(question, pairs=()), {ONE_ANSWER: 1}
    pairs = pairs_by([answer_score(answer.votes, answer.accepted) for answer in answers])
    tied = len(answers) * (len(answers) - 1) // 2 - len(pairs)
    kept = sorted(pairs, key=lambda pair: _key(question, pair))[:max_pairs]
    kept.sort(key=lambda pair: (pair.better, pair.worse))
    counts = {KEPT: len(kept), TIED: tied, OVER_LIMIT: len(pairs) - len(kept), ALL_TIED: int(not pairs)}
    return replace(question, pairs=tuple(kept)), {reason: count for reason, count in counts.items() if count}


def _key(question: Question, pair: Pair) -> bytes:
    # The lower id comes first, whichever is better: a later vote does not reshuffle the choice.
    low, high = sorted((question.answers[pair.better].id, question.answers[pair.worse].id))
    return blake2b(f"{question.site}\0{question.id}\0{low}\0{high}".encode(), digest_size=16).digest()


def pair_questions(questions: Iterable[Question], *, max_pairs: int) -> tuple[list[Question], dict[str, int]]:
    """All questions with their pairs (a question without any stays: its answers are good for SFT), and the summed
    counts.

    Raises DataError where not a single pair comes out.
    """
    counts: Counter[str] = Counter()
    paired = []
    for question in questions:
        question_with, reasons = with_pairs(question, max_pairs=max_pairs)
        paired.append(question_with)
        counts.update(reasons)
    if not counts[KEPT]:
        reasons_text = (
            ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()) if count) or "none at all"
        )
        raise DataError(
            f"no usable pair of answers in {len(paired)} questions ({reasons_text}); give a site where questions "
            f"have two or "
            "more answers with differing votes"
        )
    return paired, dict(sorted(counts.items()))


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
