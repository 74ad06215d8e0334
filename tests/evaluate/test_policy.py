"""Numbers of answers: perplexity, divergence, repetition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stackllama.evaluate.policy import Answered, answer_prompts, distinct, likelihood, repetition, tie_equal_answers
from stackllama.model.roles import REFERENCE, LoRA, Trunk
from stackllama.objectives import reward
from stackllama.rollout.engine import Response, Sampling
from stackllama.rollout.experience import response_scores
from stackllama.tokens.forest import Tree, branch_targets, plant
from tests.model.tiny import VOCABULARY, tiny_model


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_model()
    model.get_output_embeddings().weight.data.zero_()
    trees = [Tree((5, 6, 7), ((8, 2), (9, 10, 2))), Tree((11,), ((12, 13, 14, 2),))]
    trunk = Trunk(model, precision=torch.float32)
    for everything in (False, True):
        found = likelihood(trunk, REFERENCE, trees, everything=everything, row_tokens=9).perplexity
        assert found == pytest.approx(VOCABULARY, rel=1e-5)


def test_repetition_worked_by_hand() -> None:
    # 1 2 3 4 1 2 3 4 1: six 4-grams, four distinct -> 1 - 4/6.
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4, 1]) == pytest.approx(1 / 3)
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([7] * 10) == pytest.approx(6 / 7)


def test_distinct_worked_by_hand() -> None:
    # Bigrams: 12 23 | 12 24 -> three distinct of four.
    assert distinct([[1, 2, 3], [1, 2, 4]]) == pytest.approx(0.75)


def test_divergence_is_the_summed_difference_of_log_probabilities() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    for seed, role in enumerate(("policy", "reward", "judge")):
        trunk.add_adapter(role, LoRA(4, 8.0, 0.0, ("q_proj", "up_proj")), seed=seed)
        for parameter in trunk.trainable(role).values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    trunk.add_head("reward", reward.HEAD, spread=0.3, seed=1)
    trunk.add_head("judge", reward.HEAD, spread=0.3, seed=2)
    prompts = [Tree((5 + at, 6, 7) * (1 + at % 3), (), at) for at in range(7)]
    how = Sampling(seed=0, max_new_tokens=9, eos_id=2)
    answered = answer_prompts(trunk, "policy", prompts, how, reward_role="reward", judge_role="judge", row_tokens=40)
    for prompt, response, kl, nll in zip(prompts, answered.responses, answered.kl, answered.reference_nll, strict=True):
        forest = plant([Tree(prompt.root, (response.tokens,))])
        sums = []
        for role in ("policy", REFERENCE):
            with trunk.use(role) as reader:
                sums.append(float(reader.logprobs(reader.hidden(forest), branch_targets(forest)).sum()))
        assert kl == pytest.approx(sums[0] - sums[1], abs=1e-4)
        assert nll == pytest.approx(-sums[1], abs=1e-4)
    trees = [
        Tree(p.root, (one.tokens,), at) for at, (p, one) in enumerate(zip(prompts, answered.responses, strict=True))
    ]
    for role, scores in (("reward", answered.reward), ("judge", answered.judge)):
        assert response_scores(trunk, role, trees, eos_id=2, row_tokens=40).tolist() == pytest.approx(scores.tolist())
    assert answered.reward.tolist() != pytest.approx(answered.judge.tolist())
    same = answer_prompts(trunk, REFERENCE, prompts, how, reward_role="reward", judge_role="judge", row_tokens=40)
    assert not same.kl.any()
    assert all(math.isfinite(value) for value in answered.reward)


def test_equal_answers_tie_whatever_the_last_bits_of_their_scores() -> None:
    def answered(tokens: list[tuple[int, ...]], scores: list[float]) -> Answered:
        responses = tuple(Response(one, (0.0,) * len(one), "eos") for one in tokens)
        return Answered(responses, np.array(scores), np.array(scores) * 10, np.array([0.5, 0.25]), np.array([2.0, 3.0]))

    first = answered([(5, 2), (6, 2)], [0.3, 0.7])
    second = answered([(5, 2), (7, 2)], [0.3000001, 0.9])
    found = tie_equal_answers(second, first)
    assert found.reward.tolist() == [0.3, 0.9]
    assert found.judge.tolist() == [3.0, 9.0]
    assert found.kl.tolist() == [0.5, 0.25]
    assert found.responses == second.responses
