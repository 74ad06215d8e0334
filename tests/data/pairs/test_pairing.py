from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.pairs.pairing import Pairs, choose, resemblance, weigh
from stackllama.data.pairs.rules import PairRules, answer_score, pairs_by
from stackllama.data.pairs.votes import Ballots, day_number
from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.errors import DataError
from tests.data.reading import pair_questions, to_columns

BY = Attribution("https://s/a/1", "Ada", 1, "https://s/users/1", "CC BY-SA 4.0")


def one(
    number: int, votes: int, *, accepted: bool = False, text: str = "t", day: int = 1, length: int | None = None
) -> Answer:
    return Answer(number, text, votes, accepted, f"2020-01-{day:02}T00:00:00.000", BY, length)


def asked(*answers: Answer, number: int = 1) -> Question:
    return Question("s", number, "title", "text", (), 0, "2020-01-01T00:00:00.000", BY, answers)


def one_question(question: Question, rules: PairRules) -> tuple[Question, Mapping[str, int]]:
    (found,), counts = pair_questions([question], rules)
    return found, {what: count for what, count in counts.items() if not what.startswith("questions judged")}


def test_pairs_ties_and_reasons() -> None:
    # Scores 3, 2, 2, -1 and -1: ten pairs of answers, of which 2-2 and -1 with -1 are ties.
    question = asked(one(1, 1, accepted=True), one(2, 5), one(3, 2), one(4, -1), one(5, -9, accepted=True))
    found, counts = one_question(question, PairRules())
    # answer 1: log2 2 = 1, accepted: 2; answer 2: 3; answer 3: 2
    assert [(pair.better, pair.worse, pair.gap) for pair in found.pairs] == [
        (0, 3, 3), (0, 4, 3), (1, 0, 1), (1, 2, 1), (1, 3, 4), (1, 4, 4), (2, 3, 3), (2, 4, 3)
    ]  # fmt: skip
    assert counts == {"pairs kept": 8, "pair: tied score": 2}
    assert replace(found, pairs=()) == question


def test_the_limit_keeps_a_choice_that_depends_on_ids_only() -> None:
    question = asked(*(one(number, 4**number) for number in range(1, 9)))
    everything, _ = one_question(question, PairRules(max_pairs=100))
    assert len(everything.pairs) == 28
    few, counts = one_question(question, PairRules())
    assert counts == {"pairs kept": 10, "pair: over the limit of pairs a question": 18}
    assert set(few.pairs) < set(everything.pairs)
    fewer, _ = one_question(question, PairRules(max_pairs=4))
    assert set(fewer.pairs) < set(few.pairs)  # a smaller limit takes from the same order
    chosen = {frozenset((pair.better, pair.worse)) for pair in few.pairs}
    upside_down = asked(*(one(number, 4 ** (9 - number), text="other") for number in range(1, 9)))
    assert {frozenset((pair.better, pair.worse)) for pair in one_question(upside_down, PairRules())[0].pairs} == chosen
    others = [one_question(replace(question, id=number), PairRules())[0].pairs for number in range(2, 6)]
    assert any(pairs != few.pairs for pairs in others)


def test_the_choice_favours_no_answer() -> None:
    kept = [0] * 6
    for number in range(400):
        question = asked(*(one(100 * number + place, 2 ** (3 * place)) for place in range(6)), number=number)
        for pair in one_question(question, PairRules(max_pairs=3))[0].pairs:
            kept[pair.better] += 1
            kept[pair.worse] += 1
    # 400 questions with 3 of 15 pairs, each answer in 5 of 15: 400 expected, deviation about 17
    assert all(330 < count < 470 for count in kept)


def test_questions_without_pairs_stay_and_are_counted() -> None:
    questions = [asked(number=1), asked(one(1, 3), number=2), asked(one(1, 3), one(2, 3), number=3)]
    good = asked(one(1, 3), one(2, 0), number=4)
    found, counts = pair_questions([*questions, good], PairRules(max_pairs=2))
    assert [len(question.pairs) for question in found] == [0, 0, 0, 1]
    assert counts == {
        "pair: tied score": 1,
        "pairs kept": 1,
        "questions judged by all votes": 2,
        "question: all answers tied": 1,
        "question: fewer than two answers": 2,
    }
    with pytest.raises(DataError, match=r"no usable pair of answers in 3 questions.*all answers tied: 1"):
        pair_questions(questions, PairRules(max_pairs=2))
    with pytest.raises(DataError, match="no usable pair"):
        pair_questions([], PairRules(max_pairs=2))


def days(votes: Mapping[int, Mapping[int, int]], scores: list[int]) -> Ballots:
    """{number of an answer: {day of January 2020: change}} as dated votes."""
    start = day_number("2020-01-01") or 0
    rows = [(at, start + day - 1, change) for at, by_day in votes.items() for day, change in by_day.items()]
    answer_V, day_V, change_V = np.array(rows, np.int64).T
    return Ballots(answer_V, day_V, change_V, np.array(scores))


def chosen(question: Question, rules: PairRules, ballots: Ballots | None = None) -> list[tuple[int, int, int]]:
    pairs, _ = choose(to_columns([question], ballots), rules)
    return list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), pairs.gap_P.tolist(), strict=True))


SINCE = PairRules(score="votes", time="since_later")


def test_votes_from_before_the_later_answer_do_not_count() -> None:
    # The first answer had 9 days to itself and got 5 votes; from the 10th on it got 1, the later answer 3.
    question = asked(one(1, 6, day=1), one(2, 3, day=10))
    votes = days({0: {2: 5, 12: 1}, 1: {10: 1, 11: 2}}, [6, 3])
    assert chosen(question, PairRules(score="votes"), votes) == [(0, 1, 3)]
    assert chosen(question, SINCE, votes) == [(1, 0, 2)]
    assert chosen(question, replace(SINCE, skip_days=1), votes) == [(1, 0, 1)]  # 2 against 1
    assert chosen(question, replace(SINCE, skip_days=2), votes) == [(0, 1, 1)]  # 0 against 1


def test_the_later_day_is_that_of_each_pair() -> None:
    # 1 against 2 from day 5: 4 to 1. 1 and 2 against 3 from day 20: 0 to 2, 1 to 2.
    question = asked(one(1, 4, day=1), one(2, 2, day=5), one(3, 2, day=20))
    votes = days({0: {5: 3, 6: 1}, 1: {7: 1, 21: 1}, 2: {20: 2}}, [4, 2, 2])
    assert chosen(question, SINCE, votes) == [(0, 1, 2), (2, 0, 2), (2, 1, 1)]


def test_votes_that_do_not_add_up_are_not_used() -> None:
    question = asked(one(1, 6, day=1), one(2, 3, day=10))
    for scores in ([6, 4], [7, 3]):
        partly = to_columns([question], days({0: {2: 5, 12: 1}, 1: {10: 1, 11: 2}}, scores))
        pairs, counts = choose(partly, SINCE)
        assert (pairs.better_P.tolist(), pairs.gap_P.tolist()) == ([0], [3])
        assert counts["questions judged by all votes"] == 1
        assert "questions judged by the votes that both answers could have" not in counts


def test_questions_that_nobody_voted_on_have_no_dated_votes() -> None:
    # Where no answer has a vote, there is nothing to be dated: an accepted mark decides by all votes, and the days
    # between two answers matter.
    question = asked(one(1, 0, day=1, accepted=True), one(2, 0, day=10))
    voted = asked(one(3, 1, day=1), one(4, 0, day=10), number=2)
    columns = to_columns([question, voted], days({2: {11: 1}}, [0, 0, 1, 0]))
    pairs, counts = choose(columns, PairRules(time="since_later", posted_within_days=1))
    assert pairs.question_P.tolist() == [1]
    assert counts["pair: posted too far apart"] == 1
    assert counts["questions judged by all votes"] == 1
    assert counts["questions judged by the votes that both answers could have"] == 1


def test_down_votes_on_one_day_are_taken_off() -> None:
    question = asked(one(1, 0, day=1), one(2, -1, day=2))
    votes = days({0: {1: 3, 3: -3}, 1: {2: 1, 4: -2}}, [0, -1])
    assert chosen(question, SINCE, votes) == [(1, 0, 2)]  # -3 against -1
    assert chosen(question, replace(SINCE, score="log2"), votes) == []  # both scores are -1


def test_a_conflict_of_votes_and_accepted_mark() -> None:
    # Scores 2 + 1 and 4: the mark does not turn the pair. Scores 1 + 1 and 1: it does.
    wide, close = asked(one(1, 2, accepted=True), one(2, 12)), asked(one(1, 1, accepted=True), one(2, 1), one(3, 2))
    rules = PairRules()
    assert chosen(wide, rules) == [(1, 0, 1)]
    assert chosen(wide, replace(rules, conflict="accepted")) == [(0, 1, 1)]
    assert chosen(wide, replace(rules, conflict="votes")) == [(1, 0, 2)]
    assert chosen(wide, replace(rules, conflict="drop")) == []
    # Answers 1 and 3 tie at a score of 2; equal votes are no conflict.
    assert chosen(close, rules) == [(0, 1, 1), (2, 1, 1)]
    assert chosen(close, replace(rules, conflict="votes")) == [(0, 1, 1), (2, 0, 1), (2, 1, 1)]
    assert chosen(close, replace(rules, conflict="drop")) == [(0, 1, 1), (2, 1, 1)]
    assert (
        choose(to_columns([close]), replace(rules, conflict="drop"))[1]["pair: the accepted answer has fewer votes"]
        == 1
    )


def test_pairs_may_be_left_out() -> None:
    question = asked(one(1, 20, day=1, length=100), one(2, 5, day=3, length=150), one(3, 0, day=20, length=151))
    every = [(0, 1, 1), (0, 2, 4), (1, 2, 3)]
    assert chosen(question, PairRules()) == every
    for rules, left in (
        (PairRules(min_gap=3), every[1:]),
        (PairRules(min_gap=4), every[1:2]),
        (PairRules(min_votes=6), every[:2]),
        (PairRules(posted_within_days=2), every[:1]),
        (PairRules(posted_within_days=17), [every[0], every[2]]),
        (PairRules(length_ratio=1.5), [every[0], every[2]]),
        (PairRules(length_ratio=1.0), []),
    ):
        assert chosen(question, rules) == left, rules
        _, counts = choose(to_columns([question]), rules)
        assert counts["pairs kept"] == len(left)
        assert sum(count for what, count in counts.items() if what.startswith("pair: ")) == 3 - len(left)


def test_days_between_answers_do_not_matter_where_votes_are_dated() -> None:
    question = asked(one(1, 6, day=1), one(2, 3, day=10))
    votes = days({0: {2: 5, 12: 1}, 1: {10: 1, 11: 2}}, [6, 3])
    assert chosen(question, replace(SINCE, posted_within_days=1), votes) == [(1, 0, 2)]
    assert chosen(question, PairRules(posted_within_days=1), votes) == []


WORDS = [f"word{number}" for number in range(40)]


def test_near_copies_are_no_pair() -> None:
    # 40 words have 38 triples; another last word leaves 37 of 39 in common, another one in the middle 35 of 41.
    changed = [" ".join([*WORDS[:at], "other", *WORDS[at + 1 :]]) for at in (39, 20)]
    assert resemblance(" ".join(WORDS), changed[0]) == pytest.approx(37 / 39)
    assert resemblance(" ".join(WORDS), changed[1]) == pytest.approx(35 / 41)
    question = asked(one(1, 9, text=" ".join(WORDS)), one(2, 1, text=changed[0]), one(3, 0, text=" ".join(WORDS[::-1])))
    assert chosen(question, PairRules()) == [(0, 1, 2), (0, 2, 3), (1, 2, 1)]
    assert chosen(question, PairRules(near_copies=0.9)) == [(0, 2, 3), (1, 2, 1)]
    assert chosen(question, PairRules(near_copies=0.95)) == [(0, 1, 2), (0, 2, 3), (1, 2, 1)]


def test_the_signatures_miss_no_near_copies_at_any_bound() -> None:
    # Two texts of 120 words of which the first 90 are the same: 88 triples in common of 148, a resemblance of 0.59.
    # With a bound of 0.55, some of 200 such pairs have fewer than 0.55 of their bins in common, by chance.
    words = np.random.default_rng(0).integers(0, 10**6, (200, 150)).astype(str)
    asked_of = [
        asked(one(1, 9, text=" ".join(some[:120])), one(2, 0, text=" ".join([*some[:90], *some[120:]])), number=number)
        for number, some in enumerate(words)
    ]
    for bound, left in ((0.5, 0), (0.55, 0), (0.6, 200)):
        pairs, counts = choose(to_columns(asked_of), PairRules(near_copies=bound))
        assert (len(pairs), counts["pair: nearly the same text"]) == (left, 200 - left)


def test_short_texts_are_copies_where_they_are_equal() -> None:
    question = asked(
        one(1, 9, text="Use  the\nsource"), one(2, 1, text="use the source"), one(3, 0, text="use a source")
    )
    assert chosen(question, PairRules(near_copies=0.8)) == [(0, 2, 3), (1, 2, 1)]


def test_weights() -> None:
    questions = [asked(one(1, 3), one(2, 2), one(3, 0)), asked(one(4, 0)), asked(one(5, -4), one(6, 7))]
    answers = to_columns(questions)
    pairs, _ = choose(answers, PairRules())
    assert weigh(answers, pairs, "equal").tolist() == [1, 1, 1]
    assert weigh(answers, pairs, "pairs").tolist() == [2, 1, 1]  # 3 and 2 tie
    assert weigh(answers, pairs, "votes").tolist() == pytest.approx([np.log2(6), 1, 3])
    (found, *_), _ = pair_questions(questions, PairRules(margin=0.5, weight="pairs"))
    assert found.pairs == (Pair(0, 2, 2, 1.0), Pair(1, 2, 2, 1.0))
    assert found.weight == 2


@given(st.lists(st.lists(st.tuples(st.integers(-3, 40), st.booleans()), max_size=6), max_size=6))
def test_many_questions_at_a_time_are_the_same_as_one_by_one(lists: list[list[tuple[int, bool]]]) -> None:
    questions = [
        asked(*(one(at, votes, accepted=mark) for at, (votes, mark) in enumerate(some)), number=number)
        for number, some in enumerate(lists)
    ]
    pairs, counts = choose(to_columns(questions), PairRules(max_pairs=100))
    found = list(zip(*(column.tolist() for column in (pairs.question_P, pairs.better_P, pairs.worse_P)), strict=True))
    alone = [
        (number, pair.better, pair.worse)
        for number, question in enumerate(questions)
        for pair in pairs_by([answer_score(answer.votes, answer.accepted) for answer in question.answers])
    ]
    assert sorted(found) == sorted(alone)
    assert found == sorted(found)
    possible = sum(len(some) * (len(some) - 1) // 2 for some in lists)
    assert counts["pairs kept"] + counts["pair: tied score"] == possible


def test_a_question_of_very_many_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackllama.data.pairs.pairing.MOST_ANSWERS", 10)
    monkeypatch.setattr("stackllama.data.pairs.pairing._PAIRS_AT_ONCE", 50)
    large, small = asked(*(one(at, 2**at) for at in range(30))), asked(one(1, 1), one(2, 0), number=2)
    pairs, counts = choose(to_columns([large, small, large]), PairRules(max_pairs=1000))
    assert [int((pairs.question_P == number).sum()) for number in range(3)] == [45, 1, 45]
    assert len(set(pairs.better_P[:45].tolist()) | set(pairs.worse_P[:45].tolist())) == 10
    assert counts["answer: beyond the most that are compared"] == 40


def test_stated_questions_are_passed_over() -> None:
    questions = [asked(one(1, 1), one(2, 0)), asked(one(3, 1), one(4, 0), number=2)]
    pairs, counts = choose(to_columns(questions), PairRules(), np.array([False, True]))
    assert isinstance(pairs, Pairs)
    assert pairs.question_P.tolist() == [1]
    assert counts["pairs kept"] == 1
