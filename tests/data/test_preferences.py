from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.data.preferences import answer_score, earlier_wins, longer_wins, pair_questions, pairs_by, with_pairs
from stackllama.errors import DataError

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


def test_pairs_of_positions() -> None:
    assert pairs_by([2, 5, 2]) == [Pair(1, 0, 3), Pair(1, 2, 3)]
    assert pairs_by([]) == pairs_by([1]) == pairs_by([1, 1]) == []


def test_pairs_ties_and_reasons() -> None:
    # Scores 3, 2, 2, -1 and -1: ten pairs of answers, of which 2-2 and -1 with -1 are ties.
    question = asked(one(1, 1, accepted=True), one(2, 5), one(3, 2), one(4, -1), one(5, -9, accepted=True))
    found, counts = with_pairs(question, max_pairs=10)
    # answer 1: log2 2 = 1, accepted: 2; answer 2: 3; answer 3: 2
    assert [(pair.better, pair.worse, pair.gap) for pair in found.pairs] == [
        (0, 3, 3), (0, 4, 3), (1, 0, 1), (1, 2, 1), (1, 3, 4), (1, 4, 4), (2, 3, 3), (2, 4, 3)
    ]  # fmt: skip
    assert counts == {"pairs kept": 8, "pair: tied score": 2}
    assert replace(found, pairs=()) == question


def test_the_limit_keeps_a_choice_that_depends_on_ids_only() -> None:
    question = asked(*(one(number, 4**number) for number in range(1, 9)))
    everything, _ = with_pairs(question, max_pairs=100)
    assert len(everything.pairs) == 28
    few, counts = with_pairs(question, max_pairs=10)
    assert counts == {"pairs kept": 10, "pair: over the limit of pairs a question": 18}
    assert set(few.pairs) < set(everything.pairs)
    fewer, _ = with_pairs(question, max_pairs=4)
    assert set(fewer.pairs) < set(few.pairs)  # a smaller limit takes from the same order
    chosen = {frozenset((pair.better, pair.worse)) for pair in few.pairs}
    upside_down = asked(*(one(number, 4 ** (9 - number), text="other") for number in range(1, 9)))
    assert {frozenset((pair.better, pair.worse)) for pair in with_pairs(upside_down, max_pairs=10)[0].pairs} == chosen
    others = [with_pairs(replace(question, id=number), max_pairs=10)[0].pairs for number in range(2, 6)]
    assert any(pairs != few.pairs for pairs in others)


def test_the_choice_favours_no_answer() -> None:
    kept = [0] * 6
    for number in range(400):
        question = asked(*(one(100 * number + place, 2 ** (3 * place)) for place in range(6)), number=number)
        for pair in with_pairs(question, max_pairs=3)[0].pairs:
            kept[pair.better] += 1
            kept[pair.worse] += 1
    # 400 questions with 3 of 15 pairs, each answer in 5 of 15: 400 expected, deviation about 17
    assert all(330 < count < 470 for count in kept)


def test_questions_without_pairs_stay_and_are_counted() -> None:
    questions = [asked(number=1), asked(one(1, 3), number=2), asked(one(1, 3), one(2, 3), number=3)]
    good = asked(one(1, 3), one(2, 0), number=4)
    found, counts = pair_questions([*questions, good], max_pairs=2)
    assert [len(question.pairs) for question in found] == [0, 0, 0, 1]
    assert counts == {
        "pair: tied score": 1,
        "pairs kept": 1,
        "question: all answers tied": 1,
        "question: fewer than two answers": 2,
    }
    with pytest.raises(DataError, match=r"no usable pair of answers in 3 questions.*all answers tied: 1"):
        pair_questions(questions, max_pairs=2)
    with pytest.raises(DataError, match="no usable pair"):
        pair_questions([], max_pairs=2)
    with pytest.raises(DataError, match="max_pairs is 0"):
        with_pairs(good, max_pairs=0)


def test_baselines_count_ties_one_half() -> None:
    question = asked(one(1, 9, text="long long", day=2), one(2, 1, text="short", day=1), one(3, 0, text="short", day=2))
    assert [longer_wins(question, pair) for pair in (Pair(0, 1, 1), Pair(1, 0, 1), Pair(1, 2, 1))] == [1.0, 0.0, 0.5]
    assert [earlier_wins(question, pair) for pair in (Pair(0, 1, 1), Pair(1, 0, 1), Pair(0, 2, 1))] == [0.0, 1.0, 0.5]


def test_length_is_what_the_reader_sees() -> None:
    # The second answer is longer only by the address of its link.
    question = asked(one(1, 9, text="abcdef", length=6), one(2, 1, text="[abc](https://a.very.long/address)", length=3))
    assert longer_wins(question, Pair(0, 1, 1)) == 1.0
