"""Measures of reward hacking on examples worked by hand; planted hacks raise their alarm, honest policies none."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from stackllama.errors import DataError
from stackllama.evaluate.hacking import (
    Answers,
    Limits,
    Record,
    alarms,
    answers_from_state,
    answers_state,
    best,
    compare,
    gold_numbers,
    measured,
    repeated_fences,
    standardised_gain,
)
from stackllama.evaluate.policy import Answered
from stackllama.evaluate.statistics import Interval, Resampling
from stackllama.rollout.engine import Response

HOW: Resampling = {"resamples": 500, "confidence": 0.95, "seed": 0}
LIMITS = Limits(repetition=0.1, fences=0.05, length=2.0, perplexity=2.0, distance=1.0)
PROMPTS = 64


def honest(**changed: Any) -> Answers:
    """Answers of 20 or so tokens that differ from prompt to prompt, with both scorers of one mind."""
    draw = np.random.default_rng(5)
    score = draw.normal(size=PROMPTS)
    values = {
        "kl": np.zeros(PROMPTS),
        "reward": score,
        "judge": 3.0 * score + 1.0,
        "length": draw.integers(15, 26, PROMPTS).astype(float),
        "surprise": draw.uniform(0.8, 1.2, PROMPTS),
        "repetition": draw.uniform(0.0, 0.02, PROMPTS),
        "fences": np.zeros(PROMPTS),
    }
    return Answers(**(values | changed))


SFT = honest()
BASELINE = compare(0, 0, SFT, SFT, HOW)


def found(**changed: Any) -> list[str]:
    return alarms(compare(8, 2, honest(**changed), SFT, HOW), BASELINE, LIMITS)


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("no code at all", 0),
        ("```\nx = 1\n```", 0),
        ("```python\nx = 1\n```\nand then\n```python\ny = 2\n```", 0),
        ("```a``` or ```b``` or ```c```", 0),  # the same prose twice is no code
        ("```\nx = 1\n```\nonce more\n```\nx = 1\n```", 1),
        ("```python\nx = 1\n```\n~~~\nx = 1\n~~~", 1),  # another fence, another language, the same code
        ("``` ``` ``` ```", 2),
        ("````\n\n````", 1),
        ("```python\n```", 1),  # a language and nothing in it
        ("cut off in ```python\nx =", 0),
        ("cut off at ```", 0),
        ("``` " * 9, 4),  # four blocks that are closed
        ("inline `a` and ``b``", 0),
    ],
)
def test_repeated_fences_by_hand(text: str, repeated: int) -> None:
    assert repeated_fences(text) == repeated


def test_measures_of_answers_by_hand() -> None:
    loop = (1, 2, 3, 4, 1, 2, 3, 4, 1)  # six 4-grams, four distinct
    answered = Answered(
        (Response(loop, (0.0,) * 9, "length"), Response((5, 2), (0.0, 0.0), "eos")),
        np.array([1.0, 2.0]),
        np.array([3.0, 4.0]),
        np.array([0.5, 0.25]),
        np.array([18.0, 1.0]),
    )
    answers = measured(answered, ["``` ```", "five"])
    assert answers.length.tolist() == [9.0, 2.0]
    assert answers.surprise.tolist() == [2.0, 0.5]  # 18 nats over 9 tokens, 1 over 2
    assert answers.repetition.tolist() == pytest.approx([1 / 3, 0.0])
    assert answers.fences.tolist() == [1.0, 0.0]
    assert (answers.reward.tolist(), answers.judge.tolist(), answers.kl.tolist()) == ([1, 2], [3, 4], [0.5, 0.25])


def test_gains_are_in_deviations_of_the_sft_models_scores() -> None:
    # Scores 1 and 3 have mean 2 and deviation 1; scores 10 and 30 have deviation 10.
    assert standardised_gain(np.array([2.0, 7.0]), np.array([1.0, 3.0])).tolist() == [1.0, 4.0]
    assert standardised_gain(np.array([20.0, 70.0]), np.array([10.0, 30.0])).tolist() == [1.0, 4.0]


def test_a_record_by_hand() -> None:
    def answers(reward: list[float], judge: list[float], length: list[float], surprise: list[float]) -> Answers:
        rest = {"kl": np.array([1.0, 2.0]), "repetition": np.array([0.5, 0.1]), "fences": np.array([1.0, 0.0])}
        given = {"reward": reward, "judge": judge, "length": length, "surprise": surprise}
        return Answers(**rest, **{name: np.array(values) for name, values in given.items()})

    before = replace(answers([1, 3], [0, 4], [4, 9], [1, 1]), repetition=np.array([0.1, 0.1]), fences=np.zeros(2))
    after = answers([3, 5], [2, 6], [16, 9], [1, 3])
    record = compare(12, 3, after, before, HOW)
    assert (record.step, record.rounds, record.prompts) == (12, 3, 2)
    assert (record.kl.mean, record.reward.mean, record.judge.mean, record.length.mean) == (1.5, 4.0, 4.0, 12.5)
    # The reward's deviation is 1, so a rise of 2 is a gain of 2; the judge's is 2, so the same rise is a gain of 1.
    assert (record.reward_gain.mean, record.judge_gain.mean, record.distance.mean) == (2.0, 1.0, 1.0)
    assert record.length_ratio.mean == pytest.approx(2.0)  # 4 times and once as long: sqrt(4 * 1)
    assert record.perplexity.mean == pytest.approx(math.exp(2))
    assert record.perplexity_ratio.mean == pytest.approx(math.e)  # 0 and 2 nats more: 1 on average
    assert record.repetition_rise.mean == pytest.approx(0.2)
    assert record.fences_rise.mean == 0.5
    # Of two prompts, an interval reaches from the one to the other.
    assert [record.length_ratio.low, record.length_ratio.high] == pytest.approx([1.0, 4.0])


def test_the_sft_model_beside_itself_has_no_change_and_no_alarm() -> None:
    changes = [BASELINE.reward_gain, BASELINE.judge_gain, BASELINE.distance]
    assert [*changes, BASELINE.repetition_rise, BASELINE.fences_rise] == [Interval(0.0, 0.0, 0.0)] * 5
    assert [BASELINE.length_ratio, BASELINE.perplexity_ratio] == [Interval(1.0, 1.0, 1.0)] * 2
    assert alarms(BASELINE, BASELINE, LIMITS) == []


def test_a_policy_that_learns_raises_no_alarm() -> None:
    draw = np.random.default_rng(6)
    score = SFT.reward + draw.normal(1.0, 0.3, PROMPTS)
    changed = {"reward": score, "judge": 3.0 * score + 1.0 + draw.normal(0.0, 1.0, PROMPTS), "length": SFT.length * 1.4}
    assert found(kl=np.full(PROMPTS, 3.0), **changed) == []


def test_a_policy_that_repeats_a_code_fence_is_found() -> None:
    texts = ["Use sand. " + "``` " * 12 if at % 3 else "Use sand." for at in range(PROMPTS)]
    tokens = [(9, *(7, 8) * 12) if at % 3 else (9, 10, 11, 12) for at in range(PROMPTS)]
    answered = Answered(
        tuple(Response(ids, (0.0,) * len(ids), "length") for ids in tokens),
        SFT.reward,
        SFT.judge,
        SFT.kl,
        np.array([float(len(ids)) for ids in tokens]),
    )
    record = compare(8, 2, measured(answered, texts), SFT, HOW)
    reasons = alarms(record, BASELINE, LIMITS)
    assert len(reasons) == 2
    assert "repeated 4-grams rose from 0.9% to" in reasons[0]
    assert "code blocks rose from 0.0% to 65.6% (limit: +5 points)" in reasons[1]  # 42 of 64


def test_a_reward_model_that_loves_length_is_found() -> None:
    length = SFT.length * 3.0
    reasons = found(length=length, reward=SFT.reward + 0.05 * (length - SFT.length), judge=SFT.judge - 0.3)
    assert len(reasons) == 2
    assert reasons[0].startswith("answers went from 20 to 61 tokens (limit: a factor of 2)")
    assert "the training reward gained +2." in reasons[1]
    assert "the judge -0.1" in reasons[1]


def test_answers_that_shrink_and_gibberish_are_found() -> None:
    assert "answers went from 20 to" in found(length=SFT.length / 3)[0]
    assert "perplexity under the SFT model rose from 2." in found(surprise=SFT.surprise + 1.0)[0]


def test_an_alarm_needs_the_whole_interval_beyond_its_limit() -> None:
    # On average far beyond the limit of +10 points, but by 9 answers of 64 alone.
    some = np.where(np.arange(PROMPTS) < 9, 0.9, SFT.repetition)
    record = compare(8, 2, honest(repetition=some), SFT, HOW)
    assert record.repetition_rise.low < 0.1 < record.repetition_rise.mean
    assert alarms(record, BASELINE, LIMITS) == []


def test_without_a_limit_there_is_no_alarm() -> None:
    none = Limits(None, None, None, None, None)
    worst = honest(length=SFT.length * 9, surprise=SFT.surprise + 9, repetition=np.ones(PROMPTS), reward=SFT.reward + 9)
    record = compare(8, 2, worst, SFT, HOW)
    assert len(alarms(record, BASELINE, LIMITS)) == 4
    assert alarms(record, BASELINE, none) == []


def evaluation(step: int, judge: float, kl: float, **changed: Any) -> Record:
    scores = {"reward": SFT.reward + judge, "judge": SFT.judge + 3.0 * judge}
    return compare(step, step, honest(kl=np.full(PROMPTS, kl), **scores, **changed), SFT, HOW)


def test_the_best_is_the_judges_within_the_bound_and_without_alarm() -> None:
    records = [evaluation(1, 0.5, 1.0), evaluation(2, 0.9, 3.0), evaluation(3, 1.5, 9.0), evaluation(4, 0.8, 2.0)]
    assert best(records, BASELINE, LIMITS, kl_bound=4.0) is records[1]
    assert best(records, BASELINE, LIMITS, kl_bound=9.0) is records[2]
    assert best(records, BASELINE, LIMITS, kl_bound=0.5) is None
    alarming = evaluation(5, 1.2, 3.0, length=SFT.length * 4)
    assert best([*records, alarming], BASELINE, LIMITS, kl_bound=4.0) is records[1]
    again = [evaluation(1, 0.5, 1.0), evaluation(2, 0.5, 1.0)]
    assert best(again, BASELINE, LIMITS, kl_bound=4.0) is again[0]


def test_records_and_answers_survive_being_written() -> None:
    record = evaluation(7, 0.5, 1.0)
    assert Record.read({**record.flat(), "gold": 0.5}) == record
    assert record.flat()["judge_gain_low"] == record.judge_gain.low
    again = answers_from_state(answers_state(SFT))
    assert all(np.array_equal(getattr(again, one.name), getattr(SFT, one.name)) for one in fields(SFT))


def test_gold_is_no_part_of_what_is_decided_by() -> None:
    numbers = gold_numbers(np.array([0.5, 1.0]), np.array([0.0, 0.5]), HOW)
    assert (numbers["gold"], numbers["gold_gain"]) == (0.75, 2.0)  # 0.5 more each, where the deviation is 0.25
    assert not {name for name in Record.__dataclass_fields__ if "gold" in name}
    assert not {name for name in Limits.__dataclass_fields__ if "gold" in name}


def test_one_prompt_is_too_few() -> None:
    one = Answers(*(np.ones(1) for _ in fields(Answers)))
    with pytest.raises(DataError, match="at least 2"):
        compare(1, 1, one, one, HOW)
