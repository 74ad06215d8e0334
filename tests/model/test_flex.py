"""The plan for CUDA gives what the plan for the CPU gives; here without a GPU, so forward alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from stackllama.model.attention import Rule
from stackllama.model.blocks import plan_blocks
from stackllama.model.flex import SHORTEST, padded, plan_flex
from stackllama.tokens.forest import Tree, plant
from tests.model.tiny import random_trees

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
H, K, E = 4, 2, 16


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("heads", [K, H])
def test_both_plans_attend_alike(window: int | None, softcap: float | None, heads: int) -> None:
    forest = plant(random_trees(2))
    tokens = len(forest)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(tokens, count, E, generator=draw) for count in (heads, K, K))
    rule = Rule(E**-0.5, window, softcap)
    found = plan_flex(forest, torch.device("cpu")).attend(query, key, value, rule)
    wanted = plan_blocks(forest).attend(query, key, value, rule)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_few_lengths_occur() -> None:
    assert len(plan_flex(plant(random_trees(2)), torch.device("cpu")).start_T) == SHORTEST
    assert {padded(tokens) for tokens in range(1, 4 * SHORTEST + 1)} == {SHORTEST, 2 * SHORTEST, 4 * SHORTEST}


@pytest.mark.parametrize("window", [None, 5, 200])
def test_the_blocks_are_those_of_the_whole_matrix_of_queries_and_keys(window: int | None) -> None:
    long = [Tree(tuple(range(300)), (tuple(range(150)), tuple(range(40)))), Tree(tuple(range(400)))]
    for trees in (random_trees(3), long):
        plan = plan_flex(plant(trees), torch.device("cpu"))
        row = torch.zeros(SHORTEST, 1, E)
        plan.attend(row, row, row, Rule(1.0, window))
        mask = plan.masks[window]
        wanted = create_block_mask(mask.mask_mod, None, None, SHORTEST, SHORTEST, device="cpu")
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(mask, name), getattr(wanted, name)), name
        assert torch.equal(mask.to_dense(), wanted.to_dense())


def test_sinks_are_refused() -> None:
    plan = plan_flex(plant(random_trees(1)), torch.device("cpu"))
    row = torch.zeros(SHORTEST, 2, E)
    with pytest.raises(ValueError, match="sinks"):
        plan.attend(row, row, row, Rule(1.0, sinks_H=torch.zeros(2)))
