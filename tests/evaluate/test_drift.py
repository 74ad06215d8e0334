"""Where scores lie among people's: hand-worked quantiles, equal weight of questions, and what has no people."""

from __future__ import annotations

import numpy as np
import pytest

from stackllama.errors import DataError
from stackllama.evaluate.drift import PEOPLE, spreads
from stackllama.evaluate.statistics import Resampling

HOW = Resampling(resamples=200, confidence=0.95, seed=0)


def test_hand_worked() -> None:
    people = np.arange(1.0, 21.0)  # 20 questions with one answer each: mean 10.5, variance (400 - 1) / 12
    policy = np.array([0.0, 10.0, 19.5, 20.0, 30.0] * 4)
    found = spreads(people, np.arange(20), {"ppo": policy}, HOW)
    assert found[PEOPLE].quantiles == (1, 5, 10, 15, 19)
    assert found[PEOPLE].mean == 10.5
    assert found[PEOPLE].deviation == pytest.approx((399 / 12) ** 0.5)
    assert (found[PEOPLE].shift, found[PEOPLE].beyond) == (0, None)
    assert found["ppo"].beyond is not None
    assert found["ppo"].beyond.mean == pytest.approx(3 / 5)  # 19.5, 20 and 30 are above 19
    assert found["ppo"].shift == pytest.approx((15.9 - 10.5) / (399 / 12) ** 0.5)


def test_questions_weigh_the_same_however_many_answers_they_have() -> None:
    # One question with 98 answers of score 0, one with a single answer of score 1: each is half of the distribution.
    people, owner = np.array([0.0] * 98 + [1.0]), np.array([1] * 98 + [0])
    found = spreads(people, owner, {"sft": np.array([0.5, 1.5])}, HOW)
    assert (found[PEOPLE].mean, found[PEOPLE].deviation) == (0.5, 0.5)
    assert found[PEOPLE].quantiles == (0, 0, 0, 1, 1)
    assert found["sft"].beyond is None  # of two questions the highest twentieth is but the highest
    assert found["sft"].shift == pytest.approx(1.0)


@pytest.mark.parametrize(("people", "share"), [(60, 1), (300, 2)])
def test_the_interval_holds_a_twentieth_where_policy_and_people_are_alike(people: int, share: int) -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        mood_Q = random.normal(size=people)  # what is asked makes people and policy score high together
        place_A = np.repeat(np.arange(people), share)
        people_A = 0.5 * mood_Q[place_A] + random.normal(size=people * share)
        found = spreads(people_A, place_A, {"sft": 0.5 * mood_Q + random.normal(size=people)}, HOW)["sft"].beyond
        assert found is not None
        held += found.low <= 0.05 <= found.high
    assert held >= 180  # 95% of 200 is 190; a share near its end is told less well by so few


def test_people_whose_scores_are_one_have_no_deviation_to_count_in() -> None:
    found = spreads(np.ones(30), np.arange(30), {"sft": np.array([1.0, 2.0] * 15)}, HOW)
    assert found["sft"].shift is None
    assert found["sft"].beyond is not None
    assert found["sft"].beyond.mean == 0.5


def test_without_people_there_is_nothing_to_lie_among() -> None:
    with pytest.raises(DataError, match="no question of the exam"):
        spreads(np.array([]), np.array([], dtype=np.int64), {"sft": np.ones(2)}, HOW)
