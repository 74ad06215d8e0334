"""The policy's exam: SFT model and policy answer the same held-out questions; every difference comes with an interval.

Legend: S responses of a policy, one for each question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackllama.data.posts import Question
from stackllama.errors import DataError
from stackllama.evaluate.policy import Answered, answer_prompts, distinct, repetition, tie_equal_answers
from stackllama.evaluate.statistics import Interval, interval, paired_difference, wins
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY
from stackllama.tokens.forest import Tree
from stackllama.tokens.template import decode_answer, question_text
from stackllama.tokens.tokenizer import Tokenizer

Floats = NDArray[np.float64]
Gold = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the exam found, as the files keep it: samples.json, policy.json and parts of summary.json."""

    samples: list[dict[str, Any]]
    policies: dict[str, dict[str, float | None]]
    summary: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class _Sat:
    """One policy's exam paper."""

    answered: Answered
    texts: tuple[str, ...]
    length: Floats
    ended: Floats
    repetition: Floats
    gold: Floats | None


def compare_policies(
    trunk: Trunk,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    prompts: Sequence[Tree],
    sampling: Sampling,
    *,
    titles: bool,
    gold: Gold | None,
    row_tokens: int,
    side_by_side: int,
    resamples: int,
    confidence: float,
    seed: int,
) -> Comparison:
    """Let the SFT model (the reference) and the policy answer each prompt once, with equal noise, and compare them.

    prompts: roots keyed by their question's place. gold: truth in [0, 1] of (question, answer), where a community has
    it; it is reported and used for nothing else.

    Raises:
        DataError: for fewer than two prompts, which no interval can be made of.
    """
    if len(prompts) < 2:
        raise DataError(
            f"{len(prompts)} held-out prompts are short enough to be answered, at least 2 are needed; raise "
            "ppo.max_prompt_tokens or data.splits.eval, or give more data"
        )
    shown = [question_text(questions[tree.key].title if titles else "", questions[tree.key].text) for tree in prompts]
    sat: dict[str, _Sat] = {}
    for name, role in (("sft", REFERENCE), ("ppo", POLICY)):
        answered = answer_prompts(
            trunk, role, prompts, sampling, reward_role="reward", judge_role="judge", row_tokens=row_tokens
        )
        if "sft" in sat:
            answered = tie_equal_answers(answered, sat["sft"].answered)
        sat[name] = _paper(answered, tokenizer, shown, gold)

    def over(values_S: Floats) -> Interval:
        return interval(values_S, resamples=resamples, confidence=confidence, seed=seed)

    def change(get: Callable[[_Sat], Floats]) -> Interval:
        after, before = get(sat["ppo"]), get(sat["sft"])
        return paired_difference(after, before, resamples=resamples, confidence=confidence, seed=seed)

    return Comparison(
        samples=[
            _sample(questions[prompts[at].key], shown[at], sat, at) for at in range(min(side_by_side, len(prompts)))
        ],
        policies={name: _policy_numbers(paper) for name, paper in sat.items()},
        summary=_summary(sat["sft"], sat["ppo"], over, change),
    )


def _paper(answered: Answered, tokenizer: Tokenizer, shown: Sequence[str], gold: Gold | None) -> _Sat:
    tokens = [response.tokens for response in answered.responses]
    texts = tuple(decode_answer(tokenizer, ids) for ids in tokens)
    return _Sat(
        answered,
        texts,
        length=np.array([len(ids) for ids in tokens], dtype=np.float64),
        ended=np.array([float(response.stopped == "eos") for response in answered.responses]),
        repetition=np.array([repetition(ids) for ids in tokens]),
        gold=None if gold is None else np.array([gold(q, a) for q, a in zip(shown, texts, strict=True)]),
    )


def _policy_numbers(paper: _Sat) -> dict[str, float | None]:
    return {
        "reward": float(paper.answered.reward.mean()),
        "judge": float(paper.answered.judge.mean()),
        "kl": float(paper.answered.kl.mean()),
        "length": float(paper.length.mean()),
        "eos_rate": float(paper.ended.mean()),
        "repetition": float(paper.repetition.mean()),
        "distinct_2": distinct([response.tokens for response in paper.answered.responses]),
        "gold": None if paper.gold is None else float(paper.gold.mean()),
    }


def _sample(question: Question, shown: str, sat: Mapping[str, _Sat], at: int) -> dict[str, Any]:
    answers = [
        {
            "role": name,
            "text": paper.texts[at],
            "reward": float(paper.answered.reward[at]),
            "judge": float(paper.answered.judge[at]),
            "gold": None if paper.gold is None else float(paper.gold[at]),
            "stopped": paper.answered.responses[at].stopped,
        }
        for name, paper in sat.items()
    ]
    return {"question": shown, "url": question.attribution.url, "answers": answers}


def _summary(
    sft: _Sat, ppo: _Sat, over: Callable[[Floats], Interval], change: Callable[[Callable[[_Sat], Floats]], Interval]
) -> dict[str, dict[str, float]]:
    numbers: dict[str, float] = {
        "prompts": len(ppo.texts),
        "eos_rate_before": float(sft.ended.mean()),
        "eos_rate_after": float(ppo.ended.mean()),
        "repetition_before": float(sft.repetition.mean()),
        "repetition_after": float(ppo.repetition.mean()),
    }
    measures: dict[str, Callable[[_Sat], Floats]] = {
        "reward": lambda paper: paper.answered.reward,
        "judge": lambda paper: paper.answered.judge,
        "length": lambda paper: paper.length,
    }
    for name, get in measures.items():
        difference = change(get)
        numbers |= {f"{name}_before": float(get(sft).mean()), f"{name}_after": float(get(ppo).mean())}
        numbers |= {f"{name}_difference_low": difference.low, f"{name}_difference_high": difference.high}
    intervals = {
        "kl": over(ppo.answered.kl),
        "win_rate": over(wins(ppo.answered.judge, sft.answered.judge)),
        "win_rate_training_reward": over(wins(ppo.answered.reward, sft.answered.reward)),
    }
    for name, found in intervals.items():
        numbers |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    if sft.gold is None or ppo.gold is None:
        return {"ppo": numbers}
    gold = change(lambda paper: paper.gold if paper.gold is not None else np.zeros(0))
    means = {"sft": float(sft.gold.mean()), "ppo": float(ppo.gold.mean())}
    return {"ppo": numbers, "gold": {**means, "difference": gold.mean, "low": gold.low, "high": gold.high}}
