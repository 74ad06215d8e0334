"""The audit of a recipe's reward models: the pairs as they are and as they are changed, beside a bag of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from stackllama.assembly import encode_paired, resampling
from stackllama.data.posts import Question
from stackllama.data.store import store
from stackllama.evaluate.audit import audit
from stackllama.evaluate.bag_of_words import fit
from stackllama.evaluate.findings import findings
from stackllama.evaluate.preference import JudgedPair, judge_pairs
from stackllama.evaluate.sensitivity import CHANGES, Reaction, react, with_noise
from stackllama.model.roles import Trunk
from stackllama.recipe import Recipe
from stackllama.run import Run
from stackllama.tokens.sources import PairedTree
from stackllama.tokens.tokenizer import Tokenizer

FILE = "audit.json"
CHANGED_QUESTIONS = 200
"""Questions, at most, whose answers are changed and scored again."""


def audit_reward_model(
    recipe: Recipe,
    run: Run,
    role: str,
    trunk: Trunk,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    held_out: Sequence[PairedTree],
    judged: Sequence[JudgedPair],
) -> dict[str, Any]:
    """The audit of "reward" or "judge", as `audit.json` has it.

    questions: of the eval split; held_out: their pairs; judged: these as the model scores them.
    """
    bag = fit(store.read_questions(run.stage("data"), role))
    scores = {(at, answer): bag.score(questions[at].answers[answer].text) for at, answer in _answers(judged)}
    words = np.array([scores[one.question, one.better] - scores[one.question, one.worse] for one in judged])
    found = audit(questions, judged, words=words, how=resampling(recipe))
    reactions = _reactions(recipe, role, trunk, tokenizer, questions, held_out, judged)
    return {
        "findings": findings(found, reactions),
        **asdict(found),
        "reactions": {change: asdict(reaction) for change, reaction in reactions.items()},
    }


def _answers(judged: Sequence[JudgedPair]) -> set[tuple[int, int]]:
    return {(one.question, answer) for one in judged for answer in (one.better, one.worse)}


def _reactions(
    recipe: Recipe,
    role: str,
    trunk: Trunk,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    held_out: Sequence[PairedTree],
    judged: Sequence[JudgedPair],
) -> dict[str, Reaction]:
    keys = sorted({tree.tree.key for tree in held_out})
    chosen = keys[:: -(-len(keys) // CHANGED_QUESTIONS)]  # of all sites and times
    inside = set(chosen)
    trees = [tree for tree in held_out if tree.tree.key in inside]
    before = [one for one in judged if one.question in inside]
    changed = {name: [change(tree, tokenizer.eos_id) for tree in trees] for name, change in CHANGES.items()}
    most, noisy = recipe.reward.answers_per_question, [with_noise(questions[at]) for at in chosen]
    encoded = encode_paired(recipe, tokenizer, noisy, answers_per_question=most).items
    changed["with Markdown noise"] = [replace(one, tree=replace(one.tree, key=chosen[one.tree.key])) for one in encoded]
    found = {}
    for name, theirs in changed.items():
        after = judge_pairs(trunk, role, theirs, row_tokens=recipe.compute.row_tokens)
        if (reaction := react(before, after, resampling(recipe))) is not None:
            found[name] = reaction
    return found
