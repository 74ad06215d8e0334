"""The exam: the policy against the SFT model, on held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from stackllama.assembly import (
    Assembled,
    accelerator,
    load_roles,
    load_trunk,
    paired_trees,
    prepare_machine,
    prompt_trees,
    resampling,
    sft_trees,
    stage_seed,
)
from stackllama.data.synthetic import community as synthetic
from stackllama.evaluate.drift import spreads
from stackllama.evaluate.exam import Comparison, compare_policies
from stackllama.evaluate.preference import answer_scores, judge_pairs
from stackllama.evaluate.statistics import ends, perplexity_intervals
from stackllama.files import atomic_write_json, digest_file
from stackllama.model.roles import REFERENCE
from stackllama.recipe import EMBEDDED, Recipe
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY
from stackllama.run import Run
from stackllama.stages.opening import open_stage
from stackllama.stages.perplexity import first_answers, read_answers
from stackllama.summary import BestOfNumbers, merge_summary


def run_evaluate(recipe: Recipe, run: Run) -> None:
    """The policy against the SFT model on held-out questions: rewards, judge, KL, lengths, gold, samples."""
    if run.is_complete("evaluate"):
        return
    prepare_machine(recipe)
    with open_stage(run, "evaluate", accelerator=accelerator(recipe)) as (folder, outputs):
        assembled = load_trunk(recipe, run.folder)
        load_roles(assembled, run.folder, "reward", "judge", "policy")
        questions, prompts = prompt_trees(recipe, run, assembled.tokenizer, "eval")
        sampling = Sampling(
            seed=stage_seed(recipe, "evaluate/sampling"),
            max_new_tokens=recipe.evaluate.max_new_tokens or recipe.ppo.max_new_tokens,
            eos_id=assembled.tokenizer.eos_id,
        )
        result = compare_policies(
            assembled.trunk,
            assembled.tokenizer,
            questions,
            prompts.items[: recipe.evaluate.prompts],
            sampling,
            gold=synthetic.gold_score if recipe.data.source == (EMBEDDED,) else None,
            titles=recipe.data.titles,
            best_of=recipe.evaluate.best_of,
            row_tokens=recipe.compute.row_tokens,
            how=resampling(recipe),
        )
        asked = [tree.key for tree in prompts.items[: recipe.evaluate.prompts]]
        atomic_write_json(folder / "drift.json", _drift(recipe, run, assembled, result, asked))
        atomic_write_json(folder / "samples.json", result.samples)
        atomic_write_json(folder / "policy.json", result.policies)
        nothing = {"best_of": dict.fromkeys(BestOfNumbers.model_fields)}  # of an exam before this one
        forgotten = _forgetting(recipe, run, assembled)
        merge_summary(run.folder, nothing | result.summary | {"ppo": {**result.summary["ppo"], **forgotten}})
        outputs |= {name: digest_file(folder / name) for name in ("samples.json", "policy.json", "drift.json")}


def _drift(
    recipe: Recipe, run: Run, assembled: Assembled, result: Comparison, asked: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Scorer -> name -> spread of the scores of people's answers to the questions asked, and of each policy's to the
    same ones; empty where people's answers to them are beyond the reward model's limits.
    """
    most, inside = recipe.reward.answers_per_question, set(asked)
    _, held_out = paired_trees(recipe, run, assembled.tokenizer, "eval", answers_per_question=most)
    trees = [tree for tree in held_out.items if tree.tree.key in inside]
    both = {key: place for place, key in enumerate(sorted({tree.tree.key for tree in trees}))}
    rows = [at for at, key in sorted(enumerate(asked), key=lambda one: one[1]) if key in both]
    found: dict[str, dict[str, Any]] = {}
    for scorer, scores in result.scores.items() if trees else ():
        judged = judge_pairs(assembled.trunk, scorer, trees, row_tokens=recipe.compute.row_tokens)
        people = answer_scores(judged)
        places = np.array([both[question] for question, _ in people])
        theirs = {name: score_S[rows] for name, score_S in scores.items()}
        spread = spreads(np.array(list(people.values())), places, theirs, resampling(recipe))
        found[scorer] = {name: asdict(one) for name, one in spread.items()}
    return found


def _forgetting(recipe: Recipe, run: Run, assembled: Assembled) -> dict[str, float]:
    """What the policy makes of held-out human answers, beside the SFT model."""
    held_out = sft_trees(recipe, run, assembled.tokenizer, "eval").items
    sample = first_answers(held_out, recipe.evaluate.perplexity_answers)
    before, after = (read_answers(recipe, assembled.trunk, role, sample) for role in (REFERENCE, POLICY))
    first, second, change = perplexity_intervals(
        (before.nll, before.tokens), (after.nll, after.tokens), **resampling(recipe)
    )
    return {
        "human_perplexity_before": first.mean,
        "human_perplexity_after": second.mean,
        **ends("human_perplexity_difference", change),
    }
