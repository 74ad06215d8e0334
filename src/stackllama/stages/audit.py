"""The audit of a recipe's reward models: the pairs as they are and as they are changed, beside a bag of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackllama.assembly import Assembled, encode_paired, resampling
from stackllama.data.posts import Question
from stackllama.data.store import store
from stackllama.evaluate.audit import Audit, audit
from stackllama.evaluate.bag_of_words import BagOfWords, fit
from stackllama.evaluate.findings import findings
from stackllama.evaluate.preference import JudgedPair, judge_pairs
from stackllama.evaluate.sensitivity import CHANGES, Reaction, react, with_noise
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
    assembled: Assembled,
    questions: Sequence[Question],
    held_out: Sequence[PairedTree],
    judged: Sequence[JudgedPair],
) -> tuple[Audit, dict[str, Any]]:
    """The audit of "reward" or "judge": its numbers, and all of it as `audit.json` has it.

    questions: of the eval split; held_out: their pairs; judged: these as the model scores them.
    """
    how = resampling(recipe)
    bag = fit(store.read_questions(run.stage("data"), role))
    found = audit(questions, judged, words=_word_margins(bag, questions, judged), how=how)
    keys = sorted({tree.tree.key for tree in held_out})
    chosen = keys[:: -(-len(keys) // CHANGED_QUESTIONS)]  # of all sites and times
    inside = set(chosen)
    trees = [tree for tree in held_out if tree.tree.key in inside]
    before = [one for one in judged if one.question in inside]
    reactions: dict[str, Reaction] = {}
    for name, changed in _changed(recipe, assembled.tokenizer, questions, chosen, trees).items():
        after = judge_pairs(assembled.trunk, role, changed, row_tokens=recipe.compute.row_tokens)
        if (reaction := react(before, after, how)) is not None:
            reactions[name] = reaction
    written = {name: asdict(reaction) for name, reaction in reactions.items()}
    return found, {"findings": findings(found, reactions), **asdict(found), "reactions": written}


def _word_margins(bag: BagOfWords, questions: Sequence[Question], judged: Sequence[JudgedPair]) -> NDArray[np.float64]:
    """What a bag of words gives the better answer of each pair more than the worse one."""
    answers = {(one.question, answer) for one in judged for answer in (one.better, one.worse)}
    scores = {(at, answer): bag.score(questions[at].answers[answer].text) for at, answer in answers}
    return np.array([scores[one.question, one.better] - scores[one.question, one.worse] for one in judged])


def _changed(
    recipe: Recipe,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    chosen: Sequence[int],
    trees: Sequence[PairedTree],
) -> dict[str, list[PairedTree]]:
    """Each change by its name -> the trees of the chosen questions with it made to all of their answers."""
    changed = {name: [change(tree, tokenizer.eos_id) for tree in trees] for name, change in CHANGES.items()}
    most, noisy = recipe.reward.answers_per_question, [with_noise(questions[at]) for at in chosen]
    encoded = encode_paired(recipe, tokenizer, noisy, answers_per_question=most).items
    changed["with Markdown noise"] = [replace(one, tree=replace(one.tree, key=chosen[one.tree.key])) for one in encoded]
    return changed
