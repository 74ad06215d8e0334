"""The policy's exam: SFT model, policy and best-of-n answer the same held-out questions; differences have intervals.

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
from stackllama.evaluate.best_of import answer_best_of, kl_bound
from stackllama.evaluate.hacking import standardised_gain
from stackllama.evaluate.policy import Answered, answer_prompts, distinct, repetition, tie_equal_answers
from stackllama.evaluate.statistics import (
    Resampling,
    ends,
    flat,
    interval,
    length_controlled,
    paired_difference,
    wins,
)
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
    """What the exam found, as the files keep it: samples.json, policy.json and parts of summary.json.

    Policies are named "sft", "ppo" (the policy, whatever trained it) and, where it was asked for, "best_of". scores:
    "reward" and "judge" -> policy -> what its answers score (S,).
    """

    samples: list[dict[str, Any]]
    policies: dict[str, dict[str, float | None]]
    summary: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, Floats]]


@dataclass(frozen=True, slots=True)
class _Sat:
    """One policy's exam paper."""

    answered: Answered
    texts: tuple[str, ...]
    length: Floats
    ended: Floats
    repetition: Floats
    gold: Floats | None


MEASURES: Mapping[str, Callable[[_Sat], Floats]] = {
    "reward": lambda paper: paper.answered.reward,
    "judge": lambda paper: paper.answered.judge,
    "length": lambda paper: paper.length,
}
"""What is compared by its paired difference, beside gold."""
UNTOLD: Mapping[str, None] = dict.fromkeys(f"win_rate_length_controlled{end}" for end in ("", "_low", "_high"))


def compare_policies(
    trunk: Trunk,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    prompts: Sequence[Tree],
    sampling: Sampling,
    *,
    titles: bool,
    gold: Gold | None,
    best_of: int,
    row_tokens: int,
    how: Resampling,
) -> Comparison:
    """Let the SFT model (the reference) and the policy answer each prompt once, with equal noise, and compare them.

    prompts: roots keyed by their question's place. gold: truth in [0, 1] of (question, answer), where a community has
    it; it is reported and used for nothing else. best_of: answers of the SFT model of which the one with the highest
    reward sits the exam too; 0: none. how: intervals are made.

    Raises:
        DataError: for fewer than two prompts, which no interval can be made of.
    """
    if len(prompts) < 2:
        raise DataError(
            f"{len(prompts)} held-out prompts are short enough to be answered, at least 2 are needed; raise "
            "ppo.max_prompt_tokens or data.splits.eval, or give more data"
        )
    shown = [question_text(questions[tree.key].title if titles else "", questions[tree.key].text) for tree in prompts]
    roles = {"reward_role": "reward", "judge_role": "judge"}
    sft = answer_prompts(trunk, REFERENCE, prompts, sampling, **roles, row_tokens=row_tokens)
    policy = answer_prompts(trunk, POLICY, prompts, sampling, **roles, row_tokens=row_tokens)
    answered = {"sft": sft, "ppo": tie_equal_answers(policy, sft)}
    if best_of:
        best = answer_best_of(trunk, prompts, sampling, best_of, **roles, row_tokens=row_tokens)
        answered["best_of"] = tie_equal_answers(best, sft)
    sat = {name: _paper(one, tokenizer, shown, gold) for name, one in answered.items()}
    summary = _against_sft(sat["ppo"], sat["sft"], how)
    if best_of:
        summary["best_of"] = _best_of_numbers(sat["best_of"], sat["sft"], best_of, how)
    return Comparison(
        samples=[_sample(questions[tree.key], shown[at], sat, at) for at, tree in enumerate(prompts)],
        policies={
            name: {
                **_policy_numbers(paper, sampled=name != "best_of"),
                **({} if name == "sft" else _gains(paper, sat["sft"], how)),
            }
            for name, paper in sat.items()
        },
        summary=summary,
        scores={
            "reward": {name: paper.answered.reward for name, paper in sat.items()},
            "judge": {name: paper.answered.judge for name, paper in sat.items()},
        },
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


def _policy_numbers(paper: _Sat, *, sampled: bool) -> dict[str, float | None]:
    """sampled: whether the answers are the model's own, and not chosen among several."""
    own_nll_S = paper.answered.reference_nll - paper.answered.kl
    answers = [response.tokens for response in paper.answered.responses]
    return {
        "reward": float(paper.answered.reward.mean()),
        "judge": float(paper.answered.judge.mean()),
        "kl": float(paper.answered.kl.mean()),
        "length": float(paper.length.mean()),
        "eos_rate": float(paper.ended.mean()),
        "repetition": float(paper.repetition.mean()),
        "entropy": float(own_nll_S.sum() / paper.length.sum()) if sampled else None,
        "distinct_1": distinct(answers, gram=1),
        "distinct_2": distinct(answers, gram=2),
        "distinct_3": distinct(answers, gram=3),
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


def _against_sft(ppo: _Sat, sft: _Sat, how: Resampling) -> dict[str, dict[str, Any]]:
    """The sections `ppo` and `gold` of the summary."""
    numbers: dict[str, float | None] = {
        "prompts": len(ppo.texts),
        "eos_rate_before": float(sft.ended.mean()),
        "eos_rate_after": float(ppo.ended.mean()),
        "repetition_before": float(sft.repetition.mean()),
        "repetition_after": float(ppo.repetition.mean()),
    }
    for name, get in MEASURES.items():
        numbers |= {f"{name}_before": float(get(sft).mean()), f"{name}_after": float(get(ppo).mean())}
    numbers |= _differences(ppo, sft, how) | flat("kl", interval(ppo.answered.kl, **how)) | _win_rates(ppo, sft, how)
    if sft.gold is None or ppo.gold is None:
        return {"ppo": numbers}
    gold = paired_difference(ppo.gold, sft.gold, **how)
    means = {"sft": float(sft.gold.mean()), "ppo": float(ppo.gold.mean())}
    return {"ppo": numbers, "gold": {**means, "difference": gold.mean, "low": gold.low, "high": gold.high}}


def _best_of_numbers(best: _Sat, sft: _Sat, n: int, how: Resampling) -> dict[str, Any]:
    """The section `best_of` of the summary."""
    found = _policy_numbers(best, sampled=False)
    means = {key: value for key, value in found.items() if value is not None and key != "kl"}
    numbers: dict[str, Any] = {"n": n, "kl_bound": kl_bound(n), **means}
    numbers |= {**_differences(best, sft, how), **_win_rates(best, sft, how)}
    if best.gold is None or sft.gold is None:
        return numbers
    gold = paired_difference(best.gold, sft.gold, **how)
    return numbers | {"gold_difference": gold.mean, "gold_low": gold.low, "gold_high": gold.high}


def _differences(paper: _Sat, sft: _Sat, how: Resampling) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, get in MEASURES.items():
        numbers |= ends(f"{name}_difference", paired_difference(get(paper), get(sft), **how))
    return numbers


def _gains(paper: _Sat, sft: _Sat, how: Resampling) -> dict[str, float]:
    """What a policy gains over the SFT model by each score, in standard deviations of the SFT model's scores."""
    scores = {
        "reward": (paper.answered.reward, sft.answered.reward),
        "judge": (paper.answered.judge, sft.answered.judge),
    }
    if paper.gold is not None and sft.gold is not None:
        scores["gold"] = (paper.gold, sft.gold)
    numbers: dict[str, float] = {}
    for name, (mine_S, theirs_S) in scores.items():
        numbers |= flat(f"{name}_gain", interval(standardised_gain(mine_S, theirs_S), **how))
    return numbers


def _win_rates(paper: _Sat, sft: _Sat, how: Resampling) -> dict[str, float | None]:
    mine, theirs = paper.answered, sft.answered
    even = length_controlled(wins(mine.judge, theirs.judge), paper.length - sft.length, **how)
    return {
        **flat("win_rate", interval(wins(mine.judge, theirs.judge), **how)),
        **(flat("win_rate_length_controlled", even) if even else UNTOLD),
        **flat("win_rate_training_reward", interval(wins(mine.reward, theirs.reward), **how)),
    }
