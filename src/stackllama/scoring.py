"""`stackllama score`: rewards of given answers to a given question, by a run's reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stackllama.assembly import load_roles, load_trunk, prepare_machine
from stackllama.errors import DataError
from stackllama.recipe_load import load_recipe
from stackllama.rollout.experience import response_scores
from stackllama.tokens.forest import Tree
from stackllama.tokens.template import encode_branch, encode_root


def score(folder: Path, question: str, answers: Sequence[str], *, role: str = "reward") -> list[float]:
    """Reward of each answer, as the run's "reward" (or "judge") sees it; only differences under one question mean
    something.

    Raises:
        DataError: for an empty question or answer.
        ModelError: when the run has no such model yet.
    """
    if not question.strip() or not answers or not all(answer.strip() for answer in answers):
        raise DataError("score needs a question and at least one answer, none of them empty")
    recipe = load_recipe(folder / "recipe.yaml")
    prepare_machine(recipe)
    assembled = load_trunk(recipe, folder)
    load_roles(assembled, folder, role)
    tokenizer = assembled.tokenizer
    branches = tuple(tuple(encode_branch(tokenizer, answer)) for answer in answers)
    tree = Tree(tuple(encode_root(tokenizer, question)), branches)
    scores = response_scores(assembled.trunk, role, [tree], eos_id=tokenizer.eos_id, row_tokens=len(tree))
    return [float(value) for value in scores]
