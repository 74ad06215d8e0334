"""The reward stage: the reward model, and the judge after it, each with its audit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stackllama.assembly import (
    FINAL,
    accelerator,
    add_trained,
    load_trunk,
    paired_trees,
    prepare_machine,
    stage_seed,
    train,
)
from stackllama.evaluate.audit import EARLIER, LONGER
from stackllama.evaluate.preference import center_rewards, judge_pairs
from stackllama.evaluate.statistics import ends, flat
from stackllama.files import atomic_write_json, digest_file, digest_folder
from stackllama.model.role_folder import save_role
from stackllama.objectives import reward
from stackllama.recipe import Recipe
from stackllama.run import Run
from stackllama.stages.audit import FILE as AUDIT
from stackllama.stages.audit import audit_reward_model
from stackllama.stages.opening import open_stage
from stackllama.summary import merge_summary
from stackllama.tokens.packing import pack
from stackllama.tokens.sources import PairedTree, reward_row, reward_source

CENTERED_ON = 256
"""Trees on whose answers a finished reward model's mean is put to 0."""


def run_reward(recipe: Recipe, run: Run) -> None:
    """The reward model on its split, then the judge, the same way, on its own."""
    for role in ("reward", "judge"):
        if not run.is_complete(role):
            _train_reward_model(recipe, run, role)


def _train_reward_model(recipe: Recipe, run: Run, role: str) -> None:
    prepare_machine(recipe)
    with open_stage(run, role, accelerator=accelerator(recipe)) as (folder, outputs):
        assembled = load_trunk(recipe, run.folder)
        trunk = assembled.trunk
        most = recipe.reward.answers_per_question
        (_, trees), (questions, held_out) = (
            paired_trees(recipe, run, assembled.tokenizer, split, answers_per_question=most) for split in (role, "eval")
        )
        atomic_write_json(folder / "left_out.json", {role: dict(trees.left_out), "eval": dict(held_out.left_out)})
        add_trained(trunk, role, recipe.reward, seed=stage_seed(recipe, f"{role}/adapter"))
        spread = 1.0 / np.sqrt(trunk.hidden_size + 1)
        trunk.add_head(role, reward.HEAD, spread=float(spread), seed=stage_seed(recipe, f"{role}/head"))
        if count := recipe.reward.head_questions:
            some = trees.items[:: -(-len(trees.items) // count)]
            rows = map(reward_row, pack(some, recipe.compute.row_tokens))
            reward.fit_head(trunk, role, rows, length_penalty=recipe.reward.length_penalty)
        source = reward_source(
            trees.items,
            questions_per_step=recipe.reward.questions_per_step,
            row_tokens=recipe.compute.row_tokens,
            epochs=recipe.reward.epochs,
            max_steps=recipe.reward.max_steps,
            seed=stage_seed(recipe, f"{role}/order"),
        )
        shown = ("loss", "accuracy", "learning_rate")
        objective = reward.RewardObjective(
            role, centring=recipe.reward.centring, length_penalty=recipe.reward.length_penalty
        )
        rate = train(recipe, run, role, trunk, objective, source, recipe.reward, source.total_steps, shown=shown)
        center_rewards(trunk, role, trees.items[:CENTERED_ON], row_tokens=recipe.compute.row_tokens)
        judged = judge_pairs(trunk, role, held_out.items, row_tokens=recipe.compute.row_tokens)
        save_role(folder / FINAL, trunk, role, head=reward.HEAD, trunk_hash=assembled.trunk_hash)
        audit, written = audit_reward_model(recipe, run, role, assembled, questions, held_out.items, judged)
        atomic_write_json(folder / AUDIT, written)
        for sentence in written["findings"]:
            print(f"{role}: {sentence}")
        numbers = {
            **flat("accuracy", audit.accuracy),
            **flat("longer_wins", audit.baseline(LONGER).accuracy),
            **flat("earlier_wins", audit.baseline(EARLIER).accuracy),
            **ends("over_longer", audit.baseline(LONGER).over),
            **ends("over_earlier", audit.baseline(EARLIER).over),
            "questions": audit.questions,
            "pairs": audit.pairs,
            "pairs_per_second": None if rate is None else rate * pairs_each(trees.items),
            "steps": source.total_steps,
        }
        merge_summary(run.folder, {"confidence": recipe.evaluate.confidence, role: numbers})
        outputs |= {FINAL: digest_folder(folder / FINAL), AUDIT: digest_file(folder / AUDIT)}


def pairs_each(trees: Sequence[PairedTree]) -> float:
    """Pairs of a question, on average."""
    return sum(len(tree.pairs) for tree in trees) / len({tree.tree.key for tree in trees})
