"""`stackllama score`: rewards of given answers to a given question, by a run's reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stackllama.assembly import load_roles, load_trunk, prepare_machine
from stackllama.errors import DataError, ModelError
from stackllama.model.roles import Trunk
from stackllama.model.support import usable_context
from stackllama.recipe_load import load_recipe
from stackllama.rollout.experience import response_scores
from stackllama.tokens.forest import Tree
from stackllama.tokens.template import encode_branch, encode_root


def score(folder: Path, question: str, answers: Sequence[str], *, role: str = "reward") -> list[float]:
    """Reward of each answer, as the run's "reward" (or "judge") sees it; only differences under one question mean
    something.

    Raises:
        DataError: for a question or an answer that is empty or no Unicode, and for no answer at all.
        RunError: when the run has no such model yet.
        ModelError: when the question and an answer are beyond the model's context.
    """
    if not answers:
        raise DataError("score was given no answer; give at least one")
    check_text("question", question)
    for answer in answers:
        check_text("answer", answer)
    recipe = load_recipe(folder / "recipe.yaml")
    prepare_machine(recipe)
    assembled = load_trunk(recipe, folder)
    load_roles(assembled, folder, role)
    tokenizer = assembled.tokenizer
    branches = tuple(tuple(encode_branch(tokenizer, answer)) for answer in answers)
    tree = Tree(tuple(encode_root(tokenizer, question)), branches)
    check_context(assembled.trunk, {"a question": len(tree.root), "an answer": max(map(len, branches))})
    scores = response_scores(assembled.trunk, role, [tree], eos_id=tokenizer.eos_id, row_tokens=len(tree))
    return [float(value) for value in scores]


def check_text(what: str, text: str) -> None:
    """Raise DataError where a user's text is empty or no Unicode: bytes that are not UTF-8 arrive as lone surrogates,
    which no tokenizer takes.
    """
    if not text.strip():
        raise DataError(f"the {what} is empty; give it at least a word")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the {what} is not valid Unicode from character {error.start + 1} on; give it in UTF-8"
        ) from error


def check_context(trunk: Trunk, lengths: Mapping[str, int]) -> None:
    """Raise ModelError where a sequence of these parts (what it is -> tokens) is beyond the model's context."""
    total, context = sum(lengths.values()), usable_context(trunk.model.config)
    if total > context:
        parts = " and ".join(f"{what} of {length} tokens" for what, length in lengths.items())
        raise ModelError(f"{parts} are {total} together, but the model has a context of {context}; shorten them")
