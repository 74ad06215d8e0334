"""The audit on models that are known: one that always prefers the longer answer, a random and a perfect one; and its
numbers worked by hand.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.errors import DataError
from stackllama.evaluate.audit import EARLIER, LONGER, Audit, audit, calibrate
from stackllama.evaluate.findings import findings
from stackllama.evaluate.preference import JudgedPair
from stackllama.evaluate.statistics import Resampling

WHO = Attribution("https://example/q/1", "Ann", 1, None, "CC BY-SA 4.0")
HOW: Resampling = {"resamples": 500, "confidence": 0.95, "seed": 0}
CODE = "```\nx = 1\n```"


def question(number: int, better: str, worse: str, *, gap: int = 1, tag: str = "a", site: str = "one") -> Question:
    answers = (
        Answer(1, better, 3, False, "2020-01-02", WHO),
        Answer(2, worse, 0, False, "2020-01-01" if number % 2 else "2020-01-03", WHO),
    )
    return Question(site, number, "t", "q", (tag,), 0, "2020-01-01", WHO, answers, (Pair(0, 1, gap),))


def community(count: int = 200) -> list[Question]:
    """The better answer is the longer one in three of five questions."""
    return [
        question(at, "x" * (40 if at % 5 < 3 else 10), "y" * 20, gap=1 + at % 3, tag="ab"[at % 2])
        for at in range(count)
    ]


QUESTIONS = community()


def judged(margins: list[float]) -> list[JudgedPair]:
    return [JudgedPair(at, 0, 1, margin, 0.0) for at, margin in enumerate(margins)]


def audited(margins: list[float]) -> Audit:
    return audit(QUESTIONS, judged(margins), words=None, how=HOW)


def said(margins: list[float]) -> str:
    return " ".join(findings(audited(margins), {}))


def by_length() -> list[float]:
    return [math.log(len(one.answers[0].text) / len(one.answers[1].text)) for one in QUESTIONS]


def test_a_model_that_prefers_the_longer_answer_is_found_out_though_it_is_better_than_a_coin() -> None:
    found = audited(by_length())
    assert found.accuracy.mean == pytest.approx(0.6)
    assert found.accuracy.low > 0.5
    assert found.against_length is not None
    assert found.against_length.high == 0
    over = {one.label: one.over for one in found.baselines}
    assert list(over) == ["the longer answer wins", "the earlier answer wins"]  # no answer has code
    assert (over["the longer answer wins"].low, over["the longer answer wins"].high) == (0, 0)
    text = said(by_length())
    assert "better than a coin" in text
    assert "Not told apart from “the longer answer wins” (60.0%): +0.0 points" in text
    assert "Where the better answer is the shorter one it is right in 0.0% [0.0, 0.0]: it goes by length" in text


def test_a_random_model_is_not_told_apart_from_a_coin_by_anything() -> None:
    margins = np.random.default_rng(1).normal(size=len(QUESTIONS)).tolist()
    found = audited(margins)
    assert found.accuracy.low < 0.5 < found.accuracy.high
    assert found.against_length is not None
    assert found.against_length.low < 0.5 < found.against_length.high
    text = said(margins)
    assert "of held-out pairs as the community did: not told apart from a coin." in text
    assert "not told apart from a coin there" in text
    assert "goes by length" not in text


def test_a_perfect_model_beats_every_baseline_and_knows_more_than_length() -> None:
    margins = np.random.default_rng(1).uniform(0.1, 3.0, size=len(QUESTIONS)).tolist()
    found = audited(margins)
    assert found.accuracy.low == 1
    assert min(one.over.low for one in found.baselines) > 0
    assert found.against_length is not None
    assert found.against_length.low == 1
    assert {one.accuracy.mean for cut in found.slices.values() for one in cut if one.accuracy} == {1.0}
    text = said(margins)
    assert "what it knows is more than length" in text
    assert "no temperature fits them" in text


def test_slices_hold_each_pair_once_and_their_own_accuracy() -> None:
    questions = [
        question(1, "x" * 50, "y" * 10, gap=1, tag="a"),
        question(2, "x" * 50, "y" * 10, gap=1, tag="a", site="two"),
        question(3, CODE, "y" * 10, gap=5, tag="b"),
        question(4, "x" * 10, "y" * 50 + CODE, gap=7, tag="b"),
    ]
    found = audit(questions, judged([1.0, -1.0, 1.0, 1.0]), words=None, how=HOW)
    cuts = {name: {one.label: (one.pairs, one.accuracy) for one in cut} for name, cut in found.slices.items()}
    assert {name: sum(pairs for pairs, _ in cut.values()) for name, cut in cuts.items()} == dict.fromkeys(cuts, 4)
    assert set(cuts) == {"score gap", "length of the better answer over the worse", "code", "tag", "site"}
    (low, high) = (cuts["score gap"][label][1] for label in ("1", "4 and more"))
    assert low is not None
    assert high is not None
    assert (low.mean, high.mean) == (0.5, 1.0)
    assert cuts["site"]["two"] == (1, None)  # of one question no interval can be made
    assert cuts["code"]["in either answer"][0] == 2
    code = next(one for one in found.baselines if one.label == "the answer with code wins")
    assert code.accuracy.mean == pytest.approx((0.5 + 0.5 + 1 + 0) / 4)


def test_questions_weigh_the_same_however_many_pairs_they_have() -> None:
    answers = tuple(Answer(at, "x" * at, at, False, "2020-01-01", WHO) for at in range(1, 4))
    many = Question("one", 1, "t", "q", (), 0, "d", WHO, answers, (Pair(2, 0, 1), Pair(2, 1, 1), Pair(1, 0, 1)))
    pairs = [JudgedPair(0, b, w, -1.0, 0.0) for b, w in ((2, 0), (2, 1), (1, 0))]
    other = question(2, "x" * 9, "y" * 3)
    found = audit([many, other], [*pairs, JudgedPair(1, 0, 1, 1.0, 0.0)], words=np.array([1.0, 1, 1, -1]), how=HOW)
    assert found.accuracy.mean == 0.5
    words = next(one for one in found.baselines if one.label == "bag of words")
    assert (words.accuracy.mean, words.over.mean) == (0.5, 0.0)


def test_pairs_of_one_question_alone_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 questions, at least 2 .* data\.splits\.eval"):
        audit(QUESTIONS, judged([1.0]), words=None, how=HOW)


def test_a_model_that_prefers_the_shorter_answer_is_told_so() -> None:
    text = said([-margin for margin in by_length()])
    assert "right in 100.0% [100.0, 100.0], and where it is the longer one in 0.0% [0.0, 0.0]: it goes by" in text


def test_a_constant_model_has_no_temperature_and_is_not_called_sure() -> None:
    text = said([0.0] * len(QUESTIONS))
    assert "no temperature fits them; the expected calibration error is 0.0 points" in text


def test_calibration_worked_by_hand() -> None:
    # Three pairs of a question each, all at margin log 3, so confidence 3/4; two right.
    margin = math.log(3)
    found = calibrate(np.array([margin, margin, -margin]), np.array([0, 1, 2]), confidence=0.95)
    (only,) = found.bins
    assert (only.confidence, only.accuracy, only.share) == pytest.approx((3 / 4, 2 / 3, 1))
    assert found.error == pytest.approx(3 / 4 - 2 / 3)
    assert found.loss == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3)
    # The likelihood is highest where the confidence is the accuracy, 2/3: log 3 / T = log 2.
    assert found.temperature is not None
    assert found.temperature.mean == pytest.approx(math.log(3) / math.log(2), rel=1e-6)
    assert found.loss_tempered == pytest.approx((2 * math.log(3 / 2) + math.log(3)) / 3)
    # b = log 2 / log 3; slopes of the questions -m/3 * 1/3 (twice) and m/3 * 2/3, curvature m^2 * 2/9.
    spread = math.sqrt(2 * (margin / 9) ** 2 + (2 * margin / 9) ** 2) / (margin**2 * 2 / 9)
    inverse = math.log(2) / math.log(3)
    assert found.temperature.low == pytest.approx(1 / (inverse + 1.959964 * spread), rel=1e-5)
    assert found.temperature.high == 100  # b may be 0 as well: there is no end


def log_odds(count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Margins that are right as often as they say."""
    draw = np.random.default_rng(seed)
    size = draw.exponential(1.5, count)
    return np.where(draw.uniform(size=count) < 1 / (1 + np.exp(-size)), size, -size)


def test_margins_that_are_log_odds_are_calibrated_and_doubled_ones_too_sure() -> None:
    margin_P, owner_P = log_odds(20_000, 3), np.arange(20_000)
    right, sure = (calibrate(factor * margin_P, owner_P, confidence=0.95) for factor in (1, 2))
    assert right.temperature is not None
    assert sure.temperature is not None
    assert right.temperature.low < 1 < right.temperature.high
    assert sure.temperature.mean == pytest.approx(2 * right.temperature.mean, rel=1e-6)
    assert sure.temperature.low > 1
    assert right.error < 0.012
    assert sure.error > 0.05
    assert [one.share for one in right.bins] == pytest.approx([0.1] * 10, abs=1e-3)
    confidences = [one.confidence for one in right.bins]
    assert confidences == sorted(confidences)


def test_a_95_percent_interval_of_a_temperature_holds_the_truth_as_often() -> None:
    found = [calibrate(log_odds(300, seed), np.arange(300), confidence=0.95).temperature for seed in range(500)]
    held = [one is not None and one.low <= 1 <= one.high for one in found]
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.parametrize("margins", [[-1.0] * 10, [0.0] * 10, [1.0] * 10, [0.001] * 9 + [0.0], [1.0] * 5 + [-1.0] * 5])
def test_where_no_temperature_fits_there_is_none(margins: list[float]) -> None:
    found = calibrate(np.array(margins), np.arange(10), confidence=0.95)
    assert found.temperature is None
    assert found.loss_tempered is None


def test_small_margins_have_a_small_temperature() -> None:
    found = calibrate(np.array([0.001] * 90 + [-0.001] * 10), np.arange(100), confidence=0.95)
    assert found.temperature is not None
    assert found.temperature.mean == pytest.approx(0.001 / math.log(9), rel=1e-6)


def test_accuracies_are_means_over_questions_of_means_over_pairs() -> None:
    def asked(number: int, answers: list[tuple[str, str]]) -> Question:
        made = tuple(Answer(at, text, 0, False, day, WHO) for at, (text, day) in enumerate(answers))
        return Question("example", number, "t", "q", (), 0, "2020-01-01", WHO, made, (Pair(0, 1, 1),))

    questions = [
        asked(1, [("long answer", "2020-01-01"), ("short", "2020-01-02"), ("middling", "2020-01-03")]),
        asked(2, [("short", "2020-01-02"), ("long answer", "2020-01-01")]),
        asked(3, [("same", "2020-01-02"), ("size", "2020-01-01")]),
    ]
    questions[0] = replace(questions[0], pairs=(Pair(0, 1, 1), Pair(2, 1, 1)))
    pairs = [
        JudgedPair(0, 0, 1, 2.0, 0.0),  # right; longer and earlier
        JudgedPair(0, 2, 1, -1.0, 0.0),  # wrong; longer and later
        JudgedPair(1, 0, 1, 0.5, 0.0),  # right; shorter and later
        JudgedPair(2, 0, 1, 0.0, 0.0),  # a tie of scores and of lengths; later
    ]
    found = audit(questions, pairs, words=None, how=HOW)
    longer, earlier = found.baseline(LONGER), found.baseline(EARLIER)
    # Model: (1 + 0) / 2, 1, 1/2 -> mean 2/3. Longer: (1 + 1) / 2, 0, 1/2 -> 1/2. Earlier: (1 + 0) / 2, 0, 0 -> 1/6.
    assert found.accuracy.mean == pytest.approx(2 / 3)
    assert (longer.accuracy.mean, longer.over.mean) == pytest.approx((1 / 2, 2 / 3 - 1 / 2))
    assert (earlier.accuracy.mean, earlier.over.mean) == pytest.approx((1 / 6, 2 / 3 - 1 / 6))
    assert (found.questions, found.pairs) == (3, 4)


def test_baselines_that_say_nothing_are_left_out_but_for_the_two_that_everybody_asks_for() -> None:
    same = (Answer(1, "same", 3, False, "2020-01-02", WHO), Answer(2, "same", 0, False, "2020-01-02", WHO))
    alike = [replace(one, answers=same) for one in QUESTIONS]
    found = audit(alike, judged([1.0] * len(alike)), words=None, how=HOW)
    assert [(one.label, one.accuracy.mean) for one in found.baselines] == [(LONGER, 0.5), (EARLIER, 0.5)]
