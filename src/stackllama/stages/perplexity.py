"""Perplexity of a few held-out human answers: what SFT is for, and what a policy may forget."""

from __future__ import annotations

from collections.abc import Sequence

from stackllama.evaluate.policy import Likelihood, likelihood
from stackllama.model.roles import Trunk
from stackllama.recipe import EMBEDDED_TEXT, Recipe
from stackllama.tokens.forest import Tree


def first_answers(trees: Sequence[Tree], count: int) -> list[Tree]:
    """The first trees that hold `count` answers together (documents count as one each), of two questions at least:
    fewer have no interval.
    """
    chosen: list[Tree] = []
    for tree in trees:
        enough = sum(max(1, len(one.branches)) for one in chosen) >= count
        if enough and len({one.key for one in chosen}) > 1:
            break
        chosen.append(tree)
    return chosen


def read_answers(recipe: Recipe, trunk: Trunk, role: str, trees: Sequence[Tree]) -> Likelihood:
    """What a role makes of these trees: of their answers, or of all of it where the run has plain documents."""
    everything = recipe.data.source == (EMBEDDED_TEXT,)
    return likelihood(trunk, role, trees, everything=everything, row_tokens=recipe.compute.row_tokens)
