"""Flash kernels give what the blocks give, which in turn are held to a mask over all tokens in test_attention.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackllama.model.attention import ForestPlan, Rule
from stackllama.model.blocks import plan_blocks
from stackllama.model.flash import plan_flash
from stackllama.model.plans import LONG_SIGHT, RowPlan, mean_sight
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


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_a_branch_changes_no_bit_of_another(number: int) -> None:
    trees = random_trees(4)
    forest = plant(trees)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(len(forest), count, E, generator=draw) for count in (H, K, K))
    before = Flash(forest).attend(query, key, value, RULE)
    changed = forest.branches[number]
    key[changed.start : changed.stop] *= -1.0
    value[changed.start : changed.stop] += 1.0
    after = Flash(forest).attend(query, key, value, RULE)
    others = [at for at in range(len(forest)) if not changed.start <= at < changed.stop]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[changed.start : changed.stop], after[changed.start : changed.stop])


def test_the_runs_of_a_row_by_hand() -> None:
    """| 0 1 2 root | 3 4 branch | 5 branch | 6 branch | 7 8 root | 9 root | 10 11 12 branch | 13 root | ..."""
    trees = [Tree((1, 1, 1), ((1, 1), (1,), (1,))), Tree((1, 1)), Tree((1,), ((1, 1, 1),)), Tree((1,), ((1,), (1, 1)))]
    plan = plan_flash(plant(trees), CPU)
    assert plan.own.query_stops == plan.own.key_stops == (0, 5, 6, 7, 9, 13, 15, 17)
    assert plan.own.longest == (5, 5)
    assert plan.roots is not None
    assert (plan.roots.query_stops, plan.roots.key_stops) == ((0, 2, 4), (0, 3, 4))
    assert plan.branch_B.tolist() == [5, 6, 15, 16]
    assert plan.root_P.tolist() == [0, 1, 2, 13]


def test_trees_of_one_branch_need_no_second_run() -> None:
    assert plan_flash(plant([Tree((1,), ((1, 1),)), Tree((1, 1), ((1,),))]), CPU).roots is None


@pytest.mark.parametrize(
    ("rule", "plain"),
    [
        (RULE, True),
        (Rule(1.0, window=299), False),
        (Rule(1.0, window=300), True),
        (Rule(1.0, softcap=3.0), False),
        (Rule(1.0, sinks_H=torch.zeros(H)), False),
    ],
)
def test_windows_that_hide_something_caps_and_sinks_go_through_the_blocks(rule: Rule, plain: bool) -> None:
    forest = plant([Tree((1,) * 200, ((1,) * 100, (1,) * 2)), Tree((1,) * 240)])
    row = torch.randn(len(forest), H, E, generator=torch.Generator().manual_seed(0))
    plan = RowPlan(forest, CPU)
    found = plan.attend(row, row, row, rule)
    assert (plan._flash is not None, plan._general is not None) == (plain, not plain)
    wanted = plan_blocks(forest).attend(row, row, row, rule)
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()


def test_rows_in_which_tokens_see_few_others_go_through_the_blocks() -> None:
    # A root of 4 with branches of 2 and 1: 1 + 2 + 3 + 4, 5 + 6 and 5 edges; and another of 3: 6.
    assert mean_sight(plant([Tree((1,) * 4, ((1,) * 2, (1,))), Tree((1,) * 3)])) == 32 / 10
    short, long = (plant([Tree((1,) * length)]) for length in (2 * LONG_SIGHT - 2, 2 * LONG_SIGHT))
    for forest, flash in ((short, False), (long, True)):
        plan = RowPlan(forest, CPU)
        row = torch.zeros(len(forest), H, E)
        plan.attend(row, row, row, RULE)
        assert (plan._flash is not None) == flash
