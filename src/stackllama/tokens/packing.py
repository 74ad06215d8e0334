"""Packing trees into rows: as few as a token budget allows, or a given number of equal ones; never cutting a tree.

Best fit, the longest first: each tree goes to the fullest row that still holds it. With a budget of 6::

    trees   aaa  bb  cccc  d  ee        longest first:  cccc aaa bb ee d
    rows    [cccc bb]  [aaa ee d]

What is left out: cutting documents, and filling across windows; callers pass as many trees as one optimizer step (or
one split) has, which is window enough to leave little empty.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence, Sized
from typing import TypeVar

ItemT = TypeVar("ItemT", bound=Sized)


def deal(items: Sequence[ItemT], rows: int) -> list[list[ItemT]]:
    """Distribute items over so many rows of nearly equal length: the longest first, each to the emptiest row.

    Deterministic. No row stays empty where there are at least as many items as rows.
    """
    dealt: list[list[ItemT]] = [[] for _ in range(rows)]
    load = [0] * rows
    for item in sorted(items, key=len, reverse=True):
        row = load.index(min(load))
        dealt[row].append(item)
        load[row] += len(item)
    return [items for items in dealt if items]


def pack(items: Sequence[ItemT], budget: int) -> list[list[ItemT]]:
    """Distribute items over rows of at most ``budget`` tokens each.

    Deterministic: equal lengths keep their order. Rows come in the order in which they were opened.

    Raises:
        ValueError: if an item alone is longer than the budget.
    """
    rows: list[list[ItemT]] = []
    space: list[tuple[int, int]] = []  # (tokens left, row), sorted: the first that fits is the fullest that fits
    for item in sorted(items, key=len, reverse=True):
        need = len(item)
        if need > budget:
            raise ValueError(f"an item of {need} tokens does not fit a row of {budget}; raise compute.row_tokens")
        at = bisect_left(space, (need, -1))
        if at == len(space):
            rows.append([item])
            insort(space, (budget - need, len(rows) - 1))
        else:
            left, row = space.pop(at)
            rows[row].append(item)
            insort(space, (left - need, row))
    return rows
