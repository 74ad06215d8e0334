"""Packing: nothing lost, nothing cut, no row over the budget, little empty."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.tokens.packing import pack


def test_the_drawn_example() -> None:
    assert pack(["aaa", "bb", "cccc", "d", "ee"], 6) == [["cccc", "bb"], ["aaa", "ee", "d"]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_every_item_is_in_exactly_one_row_that_holds_it(lengths: list[int], budget: int) -> None:
    items = [(place,) * length for place, length in enumerate(lengths)]
    rows = pack(items, budget)
    assert sorted(item[0] for row in rows for item in row) == list(range(len(items)))
    assert all(sum(map(len, row)) <= budget for row in rows)


def test_rows_of_real_lengths_come_out_nearly_full() -> None:
    draw = random.Random(0)
    items = ["x" * min(1024, int(draw.lognormvariate(5.5, 0.8)) + 1) for _ in range(2000)]
    rows = pack(items, 2048)
    empty = 1 - sum(map(len, items)) / (2048 * len(rows))
    assert empty < 0.01


def test_an_item_over_the_budget_is_refused_with_the_key_to_change() -> None:
    with pytest.raises(ValueError, match=r"7 tokens does not fit a row of 6; raise compute\.row_tokens"):
        pack(["xxxxxxx"], 6)
