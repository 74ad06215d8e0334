from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stackllama.errors import DataError
from stackllama.evaluate.statistics import (
    PRIOR,
    Interval,
    interval,
    length_controlled,
    over_seeds,
    paired_difference,
    perplexity_intervals,
    question_means,
    student_t,
    wins,
)


def coverage(runs: list[npt.NDArray[np.float64]], truth: float) -> float:
    """Share of the runs whose 95% interval holds the truth."""
    found = [interval(values, seed=seed, resamples=1000) for seed, values in enumerate(runs)]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


def test_a_95_percent_interval_of_an_accuracy_holds_the_truth_as_often() -> None:
    rng = np.random.default_rng(1)
    runs = [(rng.random(questions) < 0.62).astype(float) for questions in (100, 200, 300) for _ in range(200)]
    assert 0.93 <= coverage(runs, 0.62) <= 0.97


def test_a_95_percent_interval_of_a_paired_difference_holds_the_truth_as_often() -> None:
    rng = np.random.default_rng(2)
    runs = []
    for _ in range(500):
        ease = rng.random(150)  # shared by both: the same question is easy or hard for both
        first = (ease < 0.65).astype(float)
        second = np.where(rng.random(150) < 0.5, ease < 0.58, rng.random(150) < 0.58)
        runs.append(first - second)
    assert 0.93 <= coverage(runs, 0.65 - 0.58) <= 0.97


def test_a_95_percent_interval_over_clusters_holds_the_truth_as_often() -> None:
    rng = np.random.default_rng(3)
    held, ignored = 0, 0
    for run in range(300):
        clusters = np.repeat(np.arange(120), rng.integers(1, 5, 120))  # 1 to 4 duplicates of each question
        values = (rng.random(120) < 0.7).astype(float)[clusters]  # duplicates agree wholly
        found = interval(values, seed=run, resamples=1000, clusters=clusters)
        held += found.low <= 0.7 <= found.high
        found = interval(values, seed=run, resamples=1000)
        ignored += found.low <= 0.7 <= found.high
    assert 0.92 <= held / 300 <= 0.98
    assert ignored / 300 < 0.85  # counting duplicates as if they were new questions claims too much


def test_interval_of_a_normal_mean_is_the_textbooks() -> None:
    # 400 numbers of deviation 1 around 0: 1.96 / sqrt(400) = 0.098 either side of the mean.
    values = np.random.default_rng(0).standard_normal(400)
    values = (values - values.mean()) / values.std()
    found = interval(values, seed=0)
    assert found.mean == pytest.approx(0, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((-0.098, 0.098), abs=0.004)


def test_few_questions_widen_the_interval() -> None:
    # A plain percentile bootstrap of 8 normal numbers is about 1.83 wide in units of deviation / sqrt(8) each side
    # (1.96 * sqrt(7 / 8)); Student's t with 7 degrees of freedom asks for 2.36.
    values = np.random.default_rng(0).standard_normal(8)
    found = interval(values, seed=0)
    half_width = (found.high - found.low) / 2 / (values.std(ddof=1) / np.sqrt(8))
    assert 2.15 < half_width < 2.55


def test_mean_is_over_questions_and_clusters_are_drawn_whole() -> None:
    # Cluster a holds three questions with 1, cluster b one with 0: the mean over questions is 3/4, over clusters 1/2.
    # Drawn twice, a a gives 1, a b gives 3/4, b b gives 0: the ends of the interval are 0 and 1.
    found = interval([1, 1, 1, 0], seed=0, clusters=np.array(["a", "a", "a", "b"]))
    assert (found.mean, found.low, found.high) == (0.75, 0.0, 1.0)
    # a b is drawn half of the time, so the middle of the resampled means is 3/4, not the 1/2 of a mean over clusters.
    found = interval([1, 1, 1, 0], seed=0, clusters=np.array(["a", "a", "a", "b"]), confidence=0.2)
    assert (found.low, found.high) == (0.75, 0.75)


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(0).random(50)
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1) != interval(values, seed=2)


def test_interval_does_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50)
    at_once = interval(values, seed=1)
    monkeypatch.setattr("stackllama.evaluate.statistics.CELLS_AT_ONCE", 50 * 7)
    assert interval(values, seed=1) == at_once


def test_more_confidence_is_wider() -> None:
    values = np.random.default_rng(0).random(50)
    wide, narrow = interval(values, seed=0, confidence=0.99), interval(values, seed=0, confidence=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_paired_difference_drops_what_both_share() -> None:
    rng = np.random.default_rng(0)
    ease = 10 * rng.standard_normal(200)
    first, second = ease + 0.5 + 0.1 * rng.standard_normal(200), ease
    found = paired_difference(first, second, seed=0)
    assert 0.45 < found.low < 0.5 < found.high < 0.55  # 0.5, while each mean alone is uncertain by 10 / sqrt(200) = 0.7
    alone = np.arange(200)
    assert paired_difference(first, second, seed=0, clusters=alone) == found
    assert paired_difference(first, second, seed=0, clusters=alone // 10) != found
    turned = paired_difference(second, first, seed=0)
    assert turned.mean == pytest.approx(-found.mean)


def test_question_means_weigh_each_question_once() -> None:
    # Question 3 has pairs 1, 0 (mean 1/2), question 7 has 1, 1, 1, 0 (mean 3/4); over pairs it would be 4/6.
    means = question_means([1, 1, 0, 1, 0, 1], np.array([3, 7, 3, 7, 7, 7]))
    assert means.tolist() == [0.5, 0.75]
    assert question_means([1.0, 0.0, 0.5], np.array(["b", "a", "b"])).tolist() == [0.0, 0.75]


def test_a_tie_is_half_a_win() -> None:
    assert wins([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).tolist() == [0.0, 0.5, 1.0]


def test_refusals() -> None:
    with pytest.raises(DataError, match="at least 2"):
        interval([1.0, 0.0], seed=0, clusters=np.array([5, 5]))
    with pytest.raises(DataError, match="at least 2"):
        interval([], seed=0)
    with pytest.raises(DataError, match="1 of them not finite"):
        interval([1.0, float("nan")], seed=0)
    with pytest.raises(DataError, match="not finite"):
        wins([float("nan")], [0.0])
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([1.0, 2.0], [1.0], seed=0)
    with pytest.raises(ValueError, match="same questions"):
        wins([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="1 cluster labels for 2 questions"):
        interval([1.0, 2.0], seed=0, clusters=np.array([0]))
    with pytest.raises(ValueError, match="one of each"):
        question_means([1.0, 2.0], np.array([1]))
    with pytest.raises(ValueError, match="confidence"):
        interval([1.0, 2.0], seed=0, confidence=95)


def test_perplexities_worked_by_hand_and_their_paired_difference() -> None:
    # Two kinds of question: 2 tokens at log 2 nats each, 6 tokens at log 4. Half of each:
    # (2 log 2 + 6 log 4) / 8 = 14 log 2 / 8, so a perplexity of 2 ** 1.75. Twice the model: every nll halved.
    nll = np.array([2 * np.log(2), 6 * np.log(4)] * 50)
    tokens = np.array([2.0, 6.0] * 50)
    before, after, change = perplexity_intervals(
        (nll, tokens), (nll / 2, tokens), seed=0, resamples=500, confidence=0.95
    )
    assert before.mean == pytest.approx(2**1.75)
    assert after.mean == pytest.approx(2**0.875)
    assert before.low < before.mean < before.high
    # Paired: the difference moves with both, so its interval is narrower than the two apart would make it.
    assert change.high - change.low < (before.high - before.low) + (after.high - after.low)
    assert change.high < 0


def test_a_perplexity_of_one_question_has_no_interval() -> None:
    one = (np.array([1.0]), np.array([2.0]))
    with pytest.raises(DataError, match="at least two held-out questions"):
        perplexity_intervals(one, one, seed=0, resamples=10, confidence=0.95)


def at_equal_lengths(won: npt.ArrayLike, longer: npt.ArrayLike, **how: Any) -> Interval:
    found = length_controlled(won, longer, **how)
    assert found is not None
    return found


def test_at_equal_lengths_all_around_a_win_rate_is_itself_but_for_the_prior() -> None:
    won = np.array([1.0] * 150 + [0.0] * 50)
    found = at_equal_lengths(won, np.zeros(200), seed=0, resamples=200, confidence=0.95)
    # 150 - 200 s(a) = PRIOR a, so s(a) is a little below 0.75.
    logit = math.log(found.mean / (1 - found.mean))
    assert 200 * found.mean == pytest.approx(150 - PRIOR * logit, abs=1e-6)
    assert found.low < 0.75 < found.high


def test_a_policy_that_wins_by_length_alone_wins_half_at_equal_lengths() -> None:
    draw = np.random.default_rng(0)
    longer = draw.normal(loc=8.0, scale=10.0, size=4000)
    won = (draw.uniform(size=4000) < 1 / (1 + np.exp(-2 * np.tanh(longer / np.sqrt(np.square(longer).mean()))))) * 1.0
    found = at_equal_lengths(won, longer, seed=0, resamples=200, confidence=0.95)
    assert won.mean() > 0.65
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.08
    in_characters = at_equal_lengths(won, 4.2 * longer, seed=0, resamples=200, confidence=0.95)
    assert in_characters.mean == pytest.approx(found.mean, abs=1e-9)


def test_a_95_percent_interval_at_equal_lengths_holds_the_truth_as_often() -> None:
    draw = np.random.default_rng(2)
    held = []
    for _ in range(500):
        lean = draw.uniform(-1, 1, 300)
        longer = np.arctanh(lean)
        slope = 1.5 * np.tanh(longer / np.sqrt(np.square(longer).mean()))
        won = (draw.uniform(size=300) < 1 / (1 + np.exp(-(0.6 + slope)))) * 1.0
        found = at_equal_lengths(won, longer, seed=0, resamples=200, confidence=0.95)
        held.append(found.low <= 1 / (1 + math.exp(-0.6)) <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97


def test_a_win_everywhere_stays_finite_and_unequal_counts_are_refused() -> None:
    found = at_equal_lengths(np.ones(50), np.arange(-5.0, 45.0), seed=0, resamples=100, confidence=0.95)
    assert 0.95 < found.mean < 1
    assert found.low <= found.mean <= found.high
    with pytest.raises(ValueError, match="one of each"):
        length_controlled([1.0, 0.0], [1.0], seed=0, resamples=100, confidence=0.95)
    with pytest.raises(DataError, match="at least two"):
        length_controlled([1.0], [1.0], seed=0, resamples=100, confidence=0.95)


def test_where_nearly_all_answers_are_longer_nothing_is_said_of_equal_lengths() -> None:
    draw = np.random.default_rng(0)
    won, longer = draw.integers(2, size=128).astype(float), draw.normal(150, 30, size=128)
    for one in (longer, -longer, np.full(128, 150.0)):
        assert length_controlled(won, one, seed=0, resamples=100, confidence=0.95) is None
    longer[:7] *= -1  # more than one in twenty
    assert length_controlled(won, longer, seed=0, resamples=100, confidence=0.95) is not None


def test_students_t_is_that_of_the_tables() -> None:
    # Abramowitz and Stegun, table 26.10, two sides.
    for freedom, t in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)):
        assert student_t(0.95, freedom) == pytest.approx(t, abs=6e-4)
    assert student_t(0.99, 4) == pytest.approx(4.604, abs=6e-4)
    assert student_t(0.95, 100) == pytest.approx(student_t(0.95, 101), abs=4e-4)


def test_a_mean_over_seeds_is_as_sure_as_their_number_allows() -> None:
    three = over_seeds([0.3, 0.4, 0.35])
    assert (three.mean, three.low, three.high) == pytest.approx((0.35, 0.35 - 0.12421, 0.35 + 0.12421), abs=1e-5)
    with pytest.raises(DataError, match="needs at least two"):
        over_seeds([0.3])
    random = np.random.default_rng(0)
    found = [over_seeds(list(values)) for values in random.normal(size=(1000, 5))]
    assert 930 <= sum(one.low <= 0 <= one.high for one in found) <= 970
