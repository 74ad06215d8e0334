from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.pairs.rules import answer_score, earlier_wins, longer_wins, pairs_by, scores_by
from stackllama.data.posts import Answer, Attribution, Pair, Question

BY = Attribution("https://s/a/1", "Ada", 1, "https://s/users/1", "CC BY-SA 4.0")


def one(
    number: int, votes: int, *, accepted: bool = False, text: str = "t", day: int = 1, length: int | None = None
) -> Answer:
    return Answer(number, text, votes, accepted, f"2020-01-{day:02}T00:00:00.000", BY, length)


def asked(*answers: Answer, number: int = 1) -> Question:
    return Question("s", number, "title", "text", (), 0, "2020-01-01T00:00:00.000", BY, answers)


@pytest.mark.parametrize(
    ("votes", "score"),
    [
        (0, 0),
        (1, 1),
        (2, 2),  # log2 3 = 1.585
        (3, 2),
        (4, 2),  # log2 5 = 2.322
        (5, 3),  # log2 6 = 2.585
        (10, 3),  # log2 11 = 3.459
        (11, 4),  # log2 12 = 3.585
        (21, 4),  # log2 22 = 4.459
        (22, 5),  # log2 23 = 4.524
        (46339, 15),  # log2 46340 = 15.49995: 2**15.5 = 46340.95
        (46340, 16),  # log2 46341 = 15.50000005
        (2**62 - 1, 62),
        (-1, -1),
        (-100, -1),
    ],
)
def test_the_score_rule(votes: int, score: int) -> None:
    assert answer_score(votes, False) == score
    assert answer_score(votes, True) == (-1 if votes < 0 else score + 1)


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_more_votes_never_score_less(a: int, b: int) -> None:
    assert answer_score(min(a, b), False) <= answer_score(max(a, b), False)


@given(st.lists(st.tuples(st.integers(-5, 10**12) | st.integers(-3, 70), st.booleans()), min_size=1))
def test_many_scores_are_those_of_one(answers: list[tuple[int, bool]]) -> None:
    votes, accepted = (np.array(column) for column in zip(*answers, strict=True))
    assert scores_by(votes, accepted, "log2").tolist() == [answer_score(*answer) for answer in answers]
    assert scores_by(votes, accepted, "votes").tolist() == votes.tolist()


def test_pairs_of_positions() -> None:
    assert pairs_by([2, 5, 2]) == [Pair(1, 0, 3), Pair(1, 2, 3)]
    assert pairs_by([]) == pairs_by([1]) == pairs_by([1, 1]) == []


def test_baselines_count_ties_one_half() -> None:
    question = asked(one(1, 9, text="long long", day=2), one(2, 1, text="short", day=1), one(3, 0, text="short", day=2))
    assert [longer_wins(question, pair) for pair in (Pair(0, 1, 1), Pair(1, 0, 1), Pair(1, 2, 1))] == [1.0, 0.0, 0.5]
    assert [earlier_wins(question, pair) for pair in (Pair(0, 1, 1), Pair(1, 0, 1), Pair(0, 2, 1))] == [0.0, 1.0, 0.5]


def test_length_is_what_the_reader_sees() -> None:
    # The second answer is longer only by the address of its link.
    question = asked(one(1, 9, text="abcdef", length=6), one(2, 1, text="[abc](https://a.very.long/address)", length=3))
    assert longer_wins(question, Pair(0, 1, 1)) == 1.0
