"""Best-of-n: the best of exactly the answers that were drawn, independent of the SFT model's own, at a bounded KL."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stackllama.evaluate.best_of import answer_best_of, kl_bound
from stackllama.evaluate.policy import answer_prompts, answer_trees
from stackllama.model.roles import REFERENCE
from stackllama.rollout.engine import Request, Sampling, sample
from stackllama.rollout.experience import response_scores
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import encode_prompts
from tests.evaluate.test_exam import QUESTIONS, TOKENIZER, make_trunk

PROMPTS = encode_prompts(TOKENIZER, QUESTIONS, titles=True, max_tokens=64).items
HOW = Sampling(seed=3, max_new_tokens=12, eos_id=TOKENIZER.eos_id)
ROLES = {"reward_role": "reward", "judge_role": "judge"}


def test_the_kept_answer_is_the_best_of_those_that_were_drawn() -> None:
    trunk, n = make_trunk(moved=0.5), 5
    found = answer_best_of(trunk, PROMPTS, HOW, n, **ROLES, row_tokens=64)  # rows too short for a prompt's five
    sft = answer_prompts(trunk, REFERENCE, PROMPTS, HOW, **ROLES, row_tokens=256)
    for at, tree in enumerate(PROMPTS):
        ids = [at + len(PROMPTS) * draw for draw in range(1, n + 1)]
        with trunk.use(REFERENCE) as role:
            drawn = [sample(role, [Request(one, tree.root)], HOW)[0].tokens for one in ids]
        alone = [Tree(tree.root, (tokens,), place) for place, tokens in enumerate(drawn)]
        scores = response_scores(trunk, "reward", alone, eos_id=HOW.eos_id, row_tokens=256).numpy()
        assert found.responses[at].tokens == drawn[int(scores.argmax())]
        assert found.reward[at] == pytest.approx(scores.max(), abs=1e-5)
        assert sft.responses[at].tokens not in drawn
    again = answer_trees(PROMPTS, found.responses)
    judge = response_scores(trunk, "judge", again, eos_id=HOW.eos_id, row_tokens=256).numpy()
    assert np.allclose(found.judge, judge, atol=1e-5)


def test_the_bound_by_hand_and_that_it_holds() -> None:
    assert kl_bound(2) == pytest.approx(0.693147 - 0.5, abs=1e-6)
    assert kl_bound(16) == pytest.approx(1.8351, abs=1e-4)
    # A model of two equally likely answers, the second better: best of 2 gives it with probability 3/4, and
    # KL = 1/4 log(1/4 / 1/2) + 3/4 log(3/4 / 1/2) = -0.1733 + 0.3041 = 0.1308 nats.
    assert kl_bound(2) > 0.1308
    # With many answers, all different, the KL comes to the bound: the k-th best of m has ((k+1)^n - k^n) / m^n.
    m, n = 20_000, 8
    p = (np.arange(1, m + 1) / m) ** n - (np.arange(m) / m) ** n
    assert float((p * np.log(p * m)).sum()) == pytest.approx(kl_bound(n), abs=1e-3)
    assert math.isclose(kl_bound(1), 0.0)
