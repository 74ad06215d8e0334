"""The stages that make a policy: PPO and its rivals, which sample, and DPO, which learns from pairs."""

from __future__ import annotations

from collections.abc import Mapping

from stackllama.assembly import (
    FINAL,
    accelerator,
    add_trained,
    load_roles,
    load_trunk,
    paired_trees,
    prepare_machine,
    prompt_trees,
    stage_seed,
    train,
    watched_prompts,
)
from stackllama.files import atomic_write_json, digest_folder
from stackllama.model.role_folder import save_role
from stackllama.objectives import ppo
from stackllama.policy_assembly import add_value, dpo_objective, experience, ppo_objective, value_objective, value_role
from stackllama.recipe import Recipe
from stackllama.rollout.experience import POLICY
from stackllama.rollout.preferences import PreferenceSource
from stackllama.run import Run
from stackllama.stages.opening import open_stage
from stackllama.stages.reward import pairs_each
from stackllama.stages.watching import leave_best, watch, watch_log
from stackllama.summary import WatchedNumbers, merge_summary
from stackllama.tokens.sources import reward_source

UNWATCHED: Mapping[str, int | str | None] = dict.fromkeys(WatchedNumbers.model_fields)
"""The numbers of a training that nobody watched: they take the place of those of an earlier one."""


def run_ppo(recipe: Recipe, run: Run) -> None:
    """PPO of the policy, or a rival of PPO, against the reward model, with a KL penalty towards the SFT model; watched
    on prompts held back from it.
    """
    if run.is_complete("ppo"):
        return
    prepare_machine(recipe)
    if recipe.ppo.method == "lora" and recipe.ppo.lora.dropout > 0:
        print("ppo: with ppo.lora.dropout above 0 the first minibatch of a round is not exact: ratios there are not 1")
    with open_stage(run, "ppo", accelerator=accelerator(recipe)) as (folder, outputs), watch_log(recipe, run) as log:
        assembled = load_trunk(recipe, run.folder)
        trunk, tokenizer = assembled.trunk, assembled.tokenizer
        load_roles(assembled, run.folder, "reward")
        add_trained(trunk, POLICY, recipe.ppo, seed=stage_seed(recipe, "ppo/adapter"))
        valued = value_role(recipe)
        head = ppo.HEAD if valued == POLICY else None
        if head is not None:
            trunk.add_head(POLICY, head, spread=0.0, seed=0)
        elif valued is not None:
            add_value(trunk, recipe)
        questions, prompts = prompt_trees(recipe, run, tokenizer, "ppo")
        trained, held_back = watched_prompts(recipe, prompts.items)
        if held_back:
            load_roles(assembled, run.folder, "judge")
        atomic_write_json(folder / "left_out.json", {"ppo": dict(prompts.left_out)})
        source = experience(recipe, run.folder, assembled, trained)
        rounds = recipe.ppo.steps
        watched = watch(recipe, log, assembled, source, rounds, questions, held_back) if held_back else None
        steps = rounds * recipe.ppo.epochs * recipe.ppo.minibatches
        rate = train(
            recipe,
            run,
            "ppo",
            trunk,
            ppo_objective(recipe),
            watched or source,
            recipe.ppo,
            steps,
            shown=("reward", "kl", "length", "kl_coefficient"),
            limits={"ratio_mean": recipe.ppo.ratio_guard},
            beside=value_objective(recipe),
        )
        if source.stopped is not None:
            print(f"ppo: stopped after {source.between_rounds} of {rounds} rounds: {source.stopped}")
        unwatched = {**UNWATCHED, "steps": source.between_rounds, "stopped_because": source.stopped}
        seen = leave_best(watched, trunk) if watched else unwatched
        save_role(folder / FINAL, trunk, POLICY, head=head, trunk_hash=assembled.trunk_hash)
        merge_summary(run.folder, {"ppo": {"episodes_per_second": rate, **seen}})
        outputs |= {FINAL: digest_folder(folder / FINAL)}


def run_dpo(recipe: Recipe, run: Run) -> None:
    """Direct preference optimization of the policy on the reward model's pairs; watched as PPO is."""
    if run.is_complete("dpo"):
        return
    section = recipe.dpo
    prepare_machine(recipe)
    if section.method == "lora" and section.lora.dropout > 0:
        print("dpo: with dpo.lora.dropout above 0 the first step is not exact: the policy is not yet the reference")
    with open_stage(run, "dpo", accelerator=accelerator(recipe)) as (folder, outputs), watch_log(recipe, run) as log:
        assembled = load_trunk(recipe, run.folder)
        trunk, most = assembled.trunk, section.answers_per_question
        _, trees = paired_trees(recipe, run, assembled.tokenizer, "reward", answers_per_question=most)
        atomic_write_json(folder / "left_out.json", {"reward": dict(trees.left_out)})
        if recipe.watch.every is not None:
            load_roles(assembled, run.folder, "reward", "judge")
        add_trained(trunk, POLICY, section, seed=stage_seed(recipe, "dpo/adapter"))
        pairs = reward_source(
            trees.items,
            questions_per_step=section.questions_per_step,
            row_tokens=recipe.compute.row_tokens,
            epochs=section.epochs,
            max_steps=section.max_steps,
            seed=stage_seed(recipe, "dpo/order"),
        )
        source, steps = PreferenceSource(trunk, pairs), pairs.total_steps
        watched = None
        if recipe.watch.every is not None:
            questions, prompts = prompt_trees(recipe, run, assembled.tokenizer, "ppo")
            held_back = watched_prompts(recipe, prompts.items)[1]
            watched = watch(recipe, log, assembled, source, steps, questions, held_back)
        shown, learned = ("loss", "accuracy", "margin", "learning_rate"), dpo_objective(recipe)
        rate = train(recipe, run, "dpo", trunk, learned, watched or source, section, steps, shown=shown)
        seen = leave_best(watched, trunk) if watched else {**UNWATCHED, "steps": steps}
        save_role(folder / FINAL, trunk, POLICY, head=None, trunk_hash=assembled.trunk_hash)
        pairs_per_second = None if rate is None else rate * pairs_each(trees.items)
        merge_summary(run.folder, {"dpo": {"pairs_per_second": pairs_per_second, **seen}})
        outputs |= {FINAL: digest_folder(folder / FINAL)}
