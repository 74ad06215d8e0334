"""What makes a policy, put together from recipe values: who has the values, and what samplers may differ by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stackllama.assembly import add_trained
from stackllama.model.roles import Trunk
from stackllama.objectives import ppo, reward
from stackllama.policy_assembly import add_value, mismatch, ppo_objective, value_objective, value_role
from stackllama.recipe import Recipe
from stackllama.recipe_load import load_recipe, with_values
from stackllama.tokens.forest import Tree, plant
from tests.model.tiny import tiny_model


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {"name": "x", "folder": str(tmp_path), "data": {"source": "embedded"}, "compute": {"dtype": "float32"}}
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_value_of_its_own_starts_as_the_reward_model(recipe: Recipe, method: str) -> None:
    lora = {"reward.lora.rank": "2", "reward.lora.targets": "[q_proj]"}
    given = with_values(recipe, {"ppo.value": "own", "reward.method": method, "sft.method": "full", **lora})
    assert value_role(given) == "value"
    assert [one.role for one in value_objective(given)] == ["value"]
    assert "value_loss" not in ppo_objective(given).terms
    trunk = Trunk(tiny_model(), precision=torch.float32)
    add_trained(trunk, "reward", given.reward, seed=0)
    trunk.add_head("reward", reward.HEAD, spread=0.3, seed=1)
    draw = torch.Generator().manual_seed(0)
    for parameter in trunk.trainable("reward").values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    add_value(trunk, given)
    forest = plant([Tree((5, 6, 7), ((8, 9, 2),))])
    with trunk.use("reward") as role:
        scores = role.score(reward.HEAD, role.hidden(forest))
    with trunk.use("value") as role:
        assert torch.equal(role.score(ppo.HEAD, role.hidden(forest)), scores)
    own, model_of_reward = trunk.trainable("value"), trunk.trainable("reward")
    assert len(own) == len(model_of_reward)
    assert not {id(one) for one in own.values()} & {id(one) for one in model_of_reward.values()}


def test_who_has_the_values(recipe: Recipe) -> None:
    assert value_role(recipe) == "policy"
    assert value_objective(recipe) == []
    assert "value_loss" in ppo_objective(recipe).terms
    assert value_role(with_values(recipe, {"ppo.advantage": "rloo"})) is None


@pytest.mark.parametrize(
    ("changes", "cap", "limit"),
    [
        ({"compute.dtype": "float32"}, None, 1e-3),
        ({"compute.dtype": "bfloat16"}, None, 0.1),
        ({"compute.dtype": "float32", "ppo.sampler": "vllm"}, 2.0, 1e-3),
        ({"ppo.sampler": "vllm", "ppo.importance_cap": "5", "ppo.sampler_difference_limit": "0.3"}, 5.0, 0.3),
        ({"ppo.sampler": "vllm", "ppo.importance_cap": "null", "compute.dtype": "bfloat16"}, None, 0.1),
    ],
)
def test_only_another_sampler_is_weighted_and_every_one_has_a_limit(
    changes: dict[str, str], cap: float | None, limit: float
) -> None:
    found = mismatch(load_recipe("smollm2-beer", {"ppo.method": "lora", **changes}))
    assert (found.cap, found.limit) == (cap, limit)
