"""The PPO source: bitwise step 0, hand-worked rewards, rounds that resume in the middle."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from stackllama.errors import DataError
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives import kl, ppo, reward
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY, ExperienceSource, PPOSettings, response_scores, token_rewards
from stackllama.tokens.batches import StepResult
from stackllama.tokens.forest import Tree, last_tokens, plant
from tests.model.tiny import VOCABULARY, tiny_model

EOS = 2
ADAPTER = LoRA(4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj"))


def make_trunk(method: str = "lora", precision: torch.dtype = torch.float32) -> Trunk:
    model = tiny_model()
    trunk = Trunk(model.to(precision) if method == "lora" else model, precision=precision)
    for seed, role in enumerate((POLICY, "reward")):
        if method == "lora":
            trunk.add_adapter(role, ADAPTER, seed=seed)
        else:
            trunk.add_copy(role)
    trunk.add_head(POLICY, ppo.HEAD, spread=0.0, seed=0)
    trunk.add_head("reward", reward.HEAD, spread=0.1, seed=1)
    return trunk


def make_source(trunk: Trunk, **changes: Any) -> ExperienceSource:
    draw = random.Random(0)
    prompts = [
        Tree(tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(3, 9))), (), at) for at in range(20)
    ]
    numbers: dict[str, Any] = {
        "rounds": 3,
        "prompts": 6,
        "samples": 2,
        "epochs": 2,
        "minibatches": 2,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "whiten": True,
        "missing_eos_penalty": 1.0,
        "kl_stop": None,
        "row_tokens": 256,
    }
    return ExperienceSource(
        trunk,
        prompts,
        settings=PPOSettings(**(numbers | changes)),
        sampling=Sampling(seed=1, max_new_tokens=8, eos_id=EOS),
        controller=kl.AdaptiveController(0.2, 6.0, 1000.0),
        estimator=kl.k1,
        reward_role="reward",
    )


def result(approximate_kl: float = 0.0) -> StepResult:
    return StepResult(1, 0.0, {"approximate_kl": approximate_kl}, 0.0, None)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_at_step_0_every_ratio_is_1_and_kl_is_0_to_the_bit(method: str, precision: torch.dtype) -> None:
    trunk = make_trunk(method, precision)
    source = make_source(trunk)
    batch = source.next()
    assert batch is not None
    assert batch.notes["kl"] == 0.0
    with trunk.use(POLICY, training=True) as policy:
        for row in batch.rows:
            now = policy.logprobs(policy.hidden(row.forest), row.targets)
            assert torch.equal(now.detach(), row.old_logprob_N)


def test_rewards_are_minus_the_charge_and_the_score_at_the_last_token() -> None:
    charge = torch.tensor([0.5, -1.0, 2.0, 4.0, 0.0])
    # Two responses of 3 and 2 tokens. With coefficient 0.1: -0.05, 0.1, -0.2 + 7, and -0.4, 0 - 3.
    found = token_rewards(charge, torch.tensor([7.0, -3.0]), torch.tensor([2, 4]), coefficient=0.1)
    assert found.tolist() == pytest.approx([-0.05, 0.1, 6.8, -0.4, -3.0])


def test_a_response_that_was_cut_is_scored_at_an_eos_put_behind_it() -> None:
    trunk = make_trunk()
    trees = [Tree((5, 6), ((7, 8, EOS), (9, 10))), Tree((11,), ((12,),))]
    found = response_scores(trunk, "reward", trees, eos_id=EOS, row_tokens=64)
    forest = plant([Tree((5, 6), ((7, 8, EOS), (9, 10, EOS))), Tree((11,), ((12, EOS),))])
    with trunk.use("reward") as scorer:
        expected = scorer.score(reward.HEAD, scorer.hidden(forest)[last_tokens(forest)])
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_tree_that_outgrows_a_row_is_scored_with_its_root_repeated() -> None:
    trunk = make_trunk()
    trees = [Tree((5, 6), ((7, 8), (9, 10, EOS), (11,), (12, 13, 14))), Tree((11,), ((12,),))]
    whole = response_scores(trunk, "reward", trees, eos_id=EOS, row_tokens=64)
    # The first tree has 2 + 3 + 3 + 2 + 4 = 14 tokens with every branch ended; a row holds 8.
    split = response_scores(trunk, "reward", trees, eos_id=EOS, row_tokens=8)
    assert torch.allclose(split, whole, atol=1e-6)


@pytest.mark.parametrize("row_tokens", [18, 256])  # 9 tokens of prompt, 8 sampled, 1 EOS: 18 holds one response
def test_every_response_is_trained_on_once_an_epoch(row_tokens: int) -> None:
    source = make_source(make_trunk(), row_tokens=row_tokens)
    seen = []
    for _ in range(4):
        batch = source.next()
        assert batch is not None
        seen.append(sum(len(row.forest.branches) for row in batch.rows))
        assert all(len(row.forest) <= row_tokens for row in batch.rows)
        source.observe(result())
    assert seen[0] + seen[1] == 12
    assert seen[2] + seen[3] == 12


def test_rounds_that_moved_too_far_are_cut_short_and_still_counted() -> None:
    source = make_source(make_trunk(), kl_stop=0.1)
    rounds, work = [], 0
    while (batch := source.next()) is not None:
        rounds.append(batch.notes["round"])
        work += batch.work
        source.observe(result(approximate_kl=0.2))
    assert rounds == [0.0, 1.0, 2.0]
    assert work == source.total_work == 36


def test_the_source_ends_after_its_rounds_and_counts_all_episodes() -> None:
    source = make_source(make_trunk())
    work = 0
    while (batch := source.next()) is not None:
        work += batch.work
        source.observe(result())
    assert work == source.total_work == 36


def test_a_half_used_round_resumes_with_the_same_rows() -> None:
    trunk = make_trunk()
    source = make_source(trunk)
    source.next()
    source.observe(result())
    state = source.state_dict()
    resumed = make_source(trunk)
    resumed.load_state_dict(state)
    for _ in range(4):  # into the next round
        one, two = source.next(), resumed.next()
        assert one is not None
        assert two is not None
        assert one.notes == two.notes
        for left, right in zip(one.rows, two.rows, strict=True):
            assert torch.equal(left.forest.tokens_T, right.forest.tokens_T)
            assert torch.equal(left.advantage_N, right.advantage_N)
            assert torch.equal(left.targets.predictor_N, right.targets.predictor_N)
        source.observe(result())
        resumed.observe(result())


def test_too_few_prompts_say_which_setting_to_change() -> None:
    with pytest.raises(DataError, match=r"asks 21 prompts a step, the ppo split has 20.*ppo\.prompts_per_step"):
        make_source(make_trunk(), prompts=21)
