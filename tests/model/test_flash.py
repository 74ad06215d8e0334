"""Flash kernels give what the blocks give, which in turn are held to a mask over all tokens in test_attention.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackllama.model.attention import ForestPlan, Rule
from stackllama.model.blocks import plan_blocks
from stackllama.model.flash import plan_flash
from stackllama.model.plans import RowPlan
from stackllama.tokens.forest import Forest, Tree, plant
from tests.model.tiny import random_trees

H, K, E = 4, 2, 16
CPU = torch.device("cpu")
RULE = Rule(E**-0.5)


class Flash:
    """The plan of flash kernels, as rows take it."""

    def __init__(self, forest: Forest) -> None:
        self._plan = plan_flash(forest, CPU)

    def attend(self, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, rule: Rule) -> Tensor:
        return self._plan.attend(query_THE, key_TKE, value_TKE, rule.scaling)


def attended(plan: ForestPlan, tokens: int, heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What is gathered, and the gradients of queries, keys and values."""
    draw = torch.Generator().manual_seed(0)
    sizes = (heads, K, K)
    given = [torch.randn(tokens, count, E, generator=draw).to(dtype).requires_grad_() for count in sizes]
    out = plan.attend(*given, RULE)  # type: ignore[call-arg, arg-type]
    out.backward(torch.randn(out.shape, generator=draw).to(dtype))
    return [out.detach(), *(one.grad for one in given if one.grad is not None)]


@pytest.mark.parametrize("heads", [K, H])
@pytest.mark.parametrize(
    "trees",
    [
        random_trees(2),
        [Tree((5, 6, 7)), Tree((8,))],
        [Tree((5,), ((6,), (7, 8), (9,) * 70)), Tree((5,) * 300, ((6,),))],
    ],
    ids=["forest", "documents", "short and long"],
)
def test_values_and_gradients_are_those_of_the_blocks(trees: list[Tree], heads: int) -> None:
    forest = plant(trees)
    for found, wanted in zip(
        attended(Flash(forest), len(forest), heads), attended(plan_blocks(forest), len(forest), heads), strict=True
    ):
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()


def test_in_bf16_it_is_no_further_from_the_truth_than_the_blocks() -> None:
    forest = plant(random_trees(3))
    truth = attended(plan_blocks(forest), len(forest), H, torch.float64)
    flash, blocks = (attended(plan, len(forest), H, torch.bfloat16) for plan in (Flash(forest), plan_blocks(forest)))
    for found, other, wanted in zip(flash, blocks, truth, strict=True):
        # Inputs are rounded before either works: that alone puts both this far off.
        assert (found - wanted).norm() <= max(1.2 * float((other - wanted).norm()), 1e-2 * float(wanted.norm()))


def test_a_branch_changes_no_bit_of_another() -> None:
    trees = random_trees(4)
    forest = plant(trees)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(len(forest), count, E, generator=draw) for count in (H, K, K))
    before = Flash(forest).attend(query, key, value, RULE)
    changed = forest.branches[1]
    key[changed.start : changed.stop] *= -1.0
    value[changed.start : changed.stop] += 1.0
    after = Flash(forest).attend(query, key, value, RULE)
    others = [at for at in range(len(forest)) if not changed.start <= at < changed.stop]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[changed.start : changed.stop], after[changed.start : changed.stop])


def test_the_runs_of_a_row_by_hand() -> None:
    """| 0 1 2 root | 3 4 branch | 5 branch | 6 7 root | 8 root | 9 10 11 branch |"""
    trees = [Tree((1, 1, 1), ((1, 1), (1,))), Tree((1, 1)), Tree((1,), ((1, 1, 1),))]
    plan = plan_flash(plant(trees), CPU)
    assert plan.own.query_stops == plan.own.key_stops == (0, 3, 5, 6, 8, 9, 12)
    assert plan.own.longest == (3, 3)
    assert plan.roots is not None
    assert (plan.roots.query_stops, plan.roots.key_stops) == ((0, 3, 6), (0, 3, 4))
    assert plan.branch_B.tolist() == [3, 4, 5, 9, 10, 11]
    assert plan.root_P.tolist() == [0, 1, 2, 8]


@pytest.mark.parametrize(
    ("rule", "plain"),
    [
        (RULE, True),
        (Rule(1.0, window=9), False),
        (Rule(1.0, window=10), True),
        (Rule(1.0, softcap=3.0), False),
        (Rule(1.0, sinks_H=torch.zeros(H)), False),
    ],
)
def test_windows_that_hide_something_caps_and_sinks_go_through_the_blocks(rule: Rule, plain: bool) -> None:
    forest = plant([Tree((1,) * 6, ((1,) * 4, (1,) * 2)), Tree((1,) * 8)])
    row = torch.randn(len(forest), H, E, generator=torch.Generator().manual_seed(0))
    plan = RowPlan(forest, CPU)
    found = plan.attend(row, row, row, rule)
    assert (plan._flash is not None, plan._general is not None) == (plain, not plain)
    wanted = plan_blocks(forest).attend(row, row, row, rule)
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()
