from __future__ import annotations

import numpy as np
import pytest

from stackllama.data.pairs import baselines
from stackllama.data.pairs.baselines import STATED, add, alternatives, is_row, ladder, table, tally
from stackllama.data.pairs.pairing import Pairs, choose
from stackllama.data.pairs.rules import PairRules, earlier_wins, longer_wins
from stackllama.data.posts import Answer, Attribution, Pair, Question
from tests.data.reading import to_columns

BY = Attribution("https://s/a/1", "Ada", 1, "https://s/users/1", "CC BY-SA 4.0")


def asked(number: int, *answers: tuple[int, int, int]) -> Question:
    """Of (votes, length, day) of each answer."""
    given = tuple(
        Answer(10 * number + at, f"text {at}", votes, False, f"2020-01-{day:02}T00:00:00.000", BY, length)
        for at, (votes, length, day) in enumerate(answers)
    )
    return Question("s", number, "title", "text", (), 0, "2020-01-01T00:00:00.000", BY, given)


# Question 1: the longer and earlier answer wins. Question 2: of three pairs the longer wins 2, the earlier 0 (one was
# posted at the same time: one half). Question 3 has no pair.
QUESTIONS = [asked(1, (9, 50, 1), (0, 20, 2)), asked(2, (0, 10, 1), (3, 30, 2), (9, 20, 2)), asked(3, (1, 5, 1))]
NONE = Pairs(*[np.zeros(0, np.int64)] * 4)


def test_the_ladder_ends_at_the_rules() -> None:
    rules = PairRules(time="since_later", near_copies=0.8, max_pairs=5, margin=1.0, weight="votes")
    steps = ladder(rules)
    assert list(steps) == ["the original rules", "time: since_later", "near_copies: 0.8"]
    assert steps["the original rules"] == PairRules(max_pairs=5)
    assert steps["near_copies: 0.8"] == PairRules(time="since_later", near_copies=0.8, max_pairs=5)
    other = alternatives(rules)
    assert "instead, time: off" in other
    assert "instead, time: since_later" not in other
    assert rules not in other.values()


def test_sums_are_means_over_questions_of_means_over_pairs() -> None:
    (row, *_) = add([tally(to_columns(QUESTIONS), NONE, PairRules(), 3)])
    assert (row["rules"], row["questions"], row["pairs"]) == ("the original rules", 2, 4)
    # longer: (1 + 2/3) / 2, deviation 1/6; earlier: (1 + (0 + 0 + 1/2) / 3) / 2, deviation 5/12
    assert row["longer_wins"] == pytest.approx(5 / 6)
    assert row["longer_error"] == pytest.approx(1 / 6 / 2**0.5)
    assert row["earlier_wins"] == pytest.approx(7 / 12)
    assert row["earlier_error"] == pytest.approx(5 / 12 / 2**0.5)


def test_they_are_the_baselines_of_the_exam() -> None:
    answers = to_columns(QUESTIONS)
    pairs, _ = choose(answers, PairRules())
    (row, *_) = add([tally(answers, NONE, PairRules(), 3)])
    for name, rule in (("longer_wins", longer_wins), ("earlier_wins", earlier_wins)):
        by_question: dict[int, list[float]] = {}
        for number, question in enumerate(QUESTIONS):
            for at in np.flatnonzero(pairs.question_P == number).tolist():
                pair = Pair(int(pairs.better_P[at]), int(pairs.worse_P[at]), 1)
                by_question.setdefault(number, []).append(rule(question, pair))
        assert row[name] == pytest.approx(np.mean([np.mean(won) for won in by_question.values()]))


def test_buckets_add_up() -> None:
    whole = add([tally(to_columns(QUESTIONS), NONE, PairRules(), 3)])
    parts = [tally(to_columns([question]), NONE, PairRules(), 3) for question in QUESTIONS]
    for row, other in zip(whole, add(parts), strict=True):
        assert row == pytest.approx(other)


def test_the_sample_is_a_share_of_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "SAMPLE", 500)
    questions = [asked(number, (9, 50, 1), (0, 20, 2)) for number in range(1, 2001)]
    (row, *_) = add([tally(to_columns(questions), NONE, PairRules(), 2000)])
    assert 420 < row["questions"] < 580  # 2000 with a chance of 1/4: 500, deviation 19


def test_nothing_left_to_compare_has_no_mean() -> None:
    rows = add([tally(to_columns(QUESTIONS), NONE, PairRules(min_votes=100), 3)])
    (row,) = (row for row in rows if row["rules"] == "min_votes: 100")
    assert (row["questions"], row["longer_wins"], row["earlier_error"]) == (0, None, None)


def test_stated_pairs_are_measured_as_they_are() -> None:
    # Question 1 came with the pair that the shorter and later answer won.
    stated = Pairs(*(np.array([number]) for number in (0, 1, 0, 1)))
    rows = {row["rules"]: row for row in add([tally(to_columns(QUESTIONS), stated, PairRules(), 3)])}
    assert (rows[STATED]["questions"], rows[STATED]["longer_wins"], rows[STATED]["earlier_wins"]) == (1, 0, 0)
    assert rows["the original rules"]["questions"] == 1
    assert list(add([tally(to_columns(QUESTIONS[:1]), stated, PairRules(), 1)])) == [rows[STATED]]


def test_the_table_for_a_terminal() -> None:
    lines = list(table(add([tally(to_columns(QUESTIONS), NONE, PairRules(min_votes=100), 3)])))
    assert lines[1].split() == ["the", "original", "rules", "2", "4", "0.833±0.118", "0.583±0.295"]
    assert lines[2].split() == ["min_votes:", "100", "0", "0", "-", "-"]


def test_a_row_that_was_read_from_a_file() -> None:
    for row in add([tally(to_columns(QUESTIONS), NONE, PairRules(min_votes=100), 3)]):
        assert is_row(row)
        assert not is_row(row | {"pairs": "7"})
        assert not is_row(row | {"longer_wins": "much"})
        assert not is_row({name: row[name] for name in row if name != "rules"})
    assert not is_row(None)
