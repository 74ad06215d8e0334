"""The policy's exam: equal policies tie, different ones are told apart the right way round, too little is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stackllama.model.attention  # noqa: F401  (registers "forest")
from stackllama.data.posts import Attribution, Question
from stackllama.errors import DataError
from stackllama.evaluate.exam import Comparison, compare_policies
from stackllama.evaluate.policy import likelihood
from stackllama.evaluate.statistics import Resampling
from stackllama.model.random_init import random_llama
from stackllama.model.roles import REFERENCE, LoRA, Trunk
from stackllama.objectives import reward
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY
from stackllama.tokens.sources import encode_prompts
from stackllama.tokens.tokenizer import Tokenizer

WHO = Attribution("https://example/q/1", "Ann", 1, None, "CC BY-SA 4.0")
QUESTIONS = [Question("example", at, "", f"What is {at}?", (), 0, "2020-01-01", WHO, ()) for at in range(6)]
TOKENIZER = Tokenizer.train(["What is it? It is 1, 2 or 3."], 300)
SETTINGS: dict[str, Any] = {"titles": True, "row_tokens": 256}


def make_trunk(*, moved: float) -> Trunk:
    """A trunk with all roles; the policy's adapter stands `moved` away from the reference."""
    model = random_llama("0.1m", TOKENIZER, seed=0, dtype=torch.float32, attention="forest")
    trunk = Trunk(model, precision=torch.float32)
    for seed, role in enumerate((POLICY, "reward", "judge")):
        trunk.add_adapter(role, LoRA(4, 8.0, 0.0, ("q_proj", "up_proj")), seed=seed)
    for parameter in trunk.trainable(POLICY).values():
        parameter.data += moved * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    for seed, role in enumerate(("reward", "judge")):
        trunk.add_head(role, reward.HEAD, spread=0.3, seed=seed)
    return trunk


def sit(trunk: Trunk, prompts: int = 6, best_of: int = 0) -> Comparison:
    encoded = encode_prompts(TOKENIZER, QUESTIONS, titles=True, max_tokens=64).items[:prompts]
    how = Sampling(seed=3, max_new_tokens=12, eos_id=TOKENIZER.eos_id)
    return compare_policies(
        trunk,
        TOKENIZER,
        QUESTIONS,
        encoded,
        how,
        gold=lambda question, answer: len(answer) / 100,
        best_of=best_of,
        how=Resampling(resamples=200, confidence=0.9, seed=0),
        **SETTINGS,
    )


def test_a_policy_that_is_the_reference_ties_in_everything() -> None:
    found = sit(make_trunk(moved=0.0)).summary
    assert (found["ppo"]["kl"], found["ppo"]["win_rate"], found["ppo"]["win_rate_training_reward"]) == (0.0, 0.5, 0.5)
    for name in ("reward", "judge", "length"):
        assert found["ppo"][f"{name}_before"] == found["ppo"][f"{name}_after"]
    assert (found["gold"]["difference"], found["gold"]["low"], found["gold"]["high"]) == (0.0, 0.0, 0.0)


def test_after_is_the_policy_and_before_is_the_sft_model() -> None:
    trunk = make_trunk(moved=0.5)
    found = sit(trunk)
    assert found.summary["ppo"]["prompts"] == 6
    assert found.summary["ppo"]["kl"] > 0
    assert found.summary["ppo"]["reward_after"] == found.policies["ppo"]["reward"]
    assert found.summary["ppo"]["reward_before"] == found.policies["sft"]["reward"]
    assert found.summary["gold"]["sft"] == found.policies["sft"]["gold"]
    for sample, question in zip(found.samples, QUESTIONS, strict=True):
        assert sample["question"] == question.text
        before, after = sample["answers"]
        assert (before["role"], after["role"]) == ("sft", "ppo")
        assert after["gold"] == len(after["text"]) / 100


def test_the_win_rate_is_the_judges_and_counts_wins_of_the_policy() -> None:
    found = sit(make_trunk(moved=0.5), prompts=4)
    for name, scorer in (("win_rate", "judge"), ("win_rate_training_reward", "reward")):
        pairs = [[answer[scorer] for answer in sample["answers"]] for sample in found.samples]
        assert found.summary["ppo"][name] == sum(after > before for before, after in pairs) / 4


def test_best_of_n_stands_beside_the_others_and_changes_nothing_of_them() -> None:
    trunk = make_trunk(moved=0.5)
    without, found = sit(trunk), sit(trunk, best_of=16)
    assert "best_of" not in without.summary
    assert {name: found.policies[name] for name in ("sft", "ppo")} == without.policies
    assert {name: found.summary[name] for name in ("ppo", "gold")} == without.summary
    for sample, before in zip(found.samples, without.samples, strict=True):
        *others, best = sample["answers"]
        assert others == before["answers"]
        assert best["role"] == "best_of"
        assert best["gold"] == len(best["text"]) / 100
    best_of = found.summary["best_of"]
    # log 16 = 2.7726 and 15 / 16 = 0.9375
    assert best_of["kl_bound"] == pytest.approx(1.8351, abs=1e-4)
    assert best_of["n"] == 16
    assert best_of["reward"] == found.policies["best_of"]["reward"] > found.policies["sft"]["reward"]  # type: ignore[operator]
    assert best_of["reward_difference_low"] > 0
    assert best_of["gold_difference"] == pytest.approx(best_of["gold"] - found.summary["gold"]["sft"])
    pairs = [(sample["answers"][0], sample["answers"][2]) for sample in sit(trunk, 4, best_of=16).samples]
    rate = sum(best["judge"] > sft["judge"] for sft, best in pairs) / 4
    assert sit(trunk, 4, best_of=16).summary["best_of"]["win_rate"] == rate


def test_gains_are_in_deviations_of_the_sft_models_scores() -> None:
    found = sit(make_trunk(moved=0.5), prompts=4)
    before, after = ([sample["answers"][at]["judge"] for sample in found.samples] for at in (0, 1))
    mean = sum(before) / 4
    deviation = (sum((score - mean) ** 2 for score in before) / 4) ** 0.5
    assert found.policies["ppo"]["judge_gain"] == pytest.approx((sum(after) / 4 - mean) / deviation)
    assert found.policies["ppo"].keys() >= {"reward_gain_low", "judge_gain_high", "gold_gain"}
    assert "judge_gain" not in found.policies["sft"]


def test_fewer_than_two_prompts_are_refused_with_what_to_change() -> None:
    for prompts in (0, 1):
        with pytest.raises(DataError, match=rf"{prompts} held-out prompts .* raise ppo\.max_prompt_tokens"):
            sit(make_trunk(moved=0.0), prompts=prompts)


def test_a_perplexity_of_nothing_is_refused_with_what_to_change() -> None:
    with pytest.raises(DataError, match=r"raise sft\.max_tokens or data\.splits\.eval"):
        likelihood(make_trunk(moved=0.0), REFERENCE, [], everything=False, row_tokens=64)
