"""One function a stage: where the recipe meets the classes.

Every function takes a resolved recipe and an open run, does its stage from wherever it stands, and returns when the
stage is complete; a complete stage is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from stackllama.assembly import (
    FINAL,
    FROZEN,
    SFT,
    Assembled,
    accelerator,
    adapter,
    add_trained,
    base_hashes,
    base_trunk,
    check_enough,
    check_fits,
    device,
    load_roles,
    load_trunk,
    paired_trees,
    prepare_machine,
    prompt_trees,
    resampling,
    sft_trees,
    source_hashes,
    stage_seed,
    train,
    training_texts,
    watched_prompts,
    weight_type,
)
from stackllama.auditing import FILE as AUDIT
from stackllama.auditing import audit_reward_model
from stackllama.data.building import build
from stackllama.data.pairs import baselines
from stackllama.data.store import store
from stackllama.data.synthetic import community as synthetic
from stackllama.data.text import language
from stackllama.data_settings import build_settings
from stackllama.errors import RunError
from stackllama.evaluate.exam import compare_policies
from stackllama.evaluate.policy import Likelihood, likelihood
from stackllama.evaluate.preference import center_rewards, examine, judge_pairs
from stackllama.evaluate.statistics import ends, flat, perplexity_intervals
from stackllama.files import atomic_write_json, digest_file, digest_folder, read_json
from stackllama.model.folder import save_model
from stackllama.model.load import load_base
from stackllama.model.probe import probe
from stackllama.model.role_folder import save_role
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.objectives import ppo, reward
from stackllama.objectives.sft import SftObjective
from stackllama.policy_assembly import (
    add_value,
    dpo_objective,
    experience,
    ppo_objective,
    value_objective,
    value_role,
)
from stackllama.recipe import EMBEDDED, EMBEDDED_TEXT, Recipe
from stackllama.recipe_load import default_settings
from stackllama.report.page import write_report
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY
from stackllama.rollout.preferences import PreferenceSource
from stackllama.run import Run, available_threads
from stackllama.summary import BestOfNumbers, WatchedNumbers, merge_summary
from stackllama.tokens.forest import Tree
from stackllama.tokens.packing import pack
from stackllama.tokens.sources import PairedTree, reward_row, reward_source, sft_source
from stackllama.tokens.tokenizer import Tokenizer
from stackllama.train.metrics import telling
from stackllama.watching import leave_best, watch

MERGE_LOSS = 0.05
"""Share of SFT's gain in perplexity that rounding the merged weights may eat; beyond it the adapter stays live."""

CENTERED_ON = 256
"""Trees on whose answers a finished reward model's mean is put to 0."""

UNWATCHED: Mapping[str, int | str | None] = dict.fromkeys(WatchedNumbers.model_fields)
"""The numbers of a training that nobody watched: they take the place of those of an earlier one."""


def run_data(recipe: Recipe, run: Run) -> None:
    """Dump to preference data: questions with answers, pairs and attribution, in five splits; or plain documents."""
    if run.is_complete("data"):
        return
    inputs = source_hashes(recipe)
    with _stage(run, "data", inputs=inputs) as (folder, outputs):
        fractions = recipe.data.splits.model_dump()
        counts: build.Counts = {}
        if recipe.data.source == (EMBEDDED_TEXT,):
            documents = synthetic.world_documents(recipe.data.documents, stage_seed(recipe, "data"))
            build.write_documents(folder, documents, fractions=fractions)
        else:
            counts = _build(recipe, folder, inputs)
        manifest = store.read_manifest(folder)
        totals = {what: manifest.total(what) for what in ("questions", "answers", "pairs", "documents")}
        splits = {key.split("/")[1]: dict(part.counts) for key, part in manifest.parts.items()}
        atomic_write_json(folder / "report.json", {**counts, **totals, "splits": splits})
        merge_summary(run.folder, {"name": run.name, "data": {what: n for what, n in totals.items() if n}})
        outputs |= {"store": manifest.fingerprint}


def _build(recipe: Recipe, folder: Path, inputs: Mapping[str, str]) -> build.Counts:
    """Build the store; the embedded community is written as a dump first."""
    paths: list[str | Path] = [*recipe.data.source]
    site = None
    settings = build_settings(recipe)
    content: dict[str, object] = dict(inputs)
    if recipe.data.source == (EMBEDDED,):
        dump, site = folder / "dump", synthetic.SITE
        paths = [dump]
        questions, seed = recipe.data.questions, stage_seed(recipe, "data")
        synthetic.write_dump(dump, questions=questions, seed=seed, fractions=settings.fractions)
        content = {"questions": questions, "seed": seed}
    machine = build.Machine(recipe.compute.threads or available_threads(), recipe.compute.engine)
    sources = build.sources(paths, site)
    ledger = Path(recipe.data.ledger) if recipe.data.ledger else folder / "ledger.parquet"
    counts = build.build(sources, folder, settings, machine, ledger=ledger, fingerprint=content, show=telling)
    for dump, tables in counts["truncated"].items():
        for table, byte in tables.items():
            print(f"{dump}: {table} breaks off at byte {byte}; the rows before it are used")
    for name, found in counts["languages"].items():
        print(f"{name}: {language.told(found)}")
    print("\n".join(baselines.table(counts["baselines"])))
    return counts


def run_sft(recipe: Recipe, run: Run) -> None:
    """Supervised fine-tuning: trains, merges the adapter into the trunk, measures perplexity before and after."""
    if run.is_complete("sft"):
        return
    prepare_machine(recipe)
    loaded = load_base(
        recipe.base.model,
        revision=recipe.base.revision,
        dtype=weight_type(recipe),
        documents=training_texts(recipe, run),
        vocabulary=recipe.base.vocabulary,
        seed=stage_seed(recipe, "base"),
        attention="forest",
    )
    check_fits(recipe, loaded)
    check_enough(recipe, run, loaded.tokenizer)
    hashes = base_hashes(loaded)
    if recipe.base.quantization == "off":  # else the device gets one layer after the other, when it is packed
        loaded.model.to(device(recipe))
    probe(loaded.model)
    with _stage(run, "sft", inputs=hashes, accelerator=accelerator(recipe)) as (folder, outputs):
        trees, held_out = (sft_trees(recipe, run, loaded.tokenizer, split) for split in ("sft", "eval"))
        atomic_write_json(folder / "left_out.json", {"sft": dict(trees.left_out), "eval": dict(held_out.left_out)})
        if recipe.base.quantization != "off":
            # What is unpacked and packed again has other bits, so the stages after this one pack these weights too.
            save_model(folder / FINAL, loaded.model, loaded.tokenizer)
        trunk = base_trunk(recipe, loaded.model)
        sample = _first_answers(held_out.items, recipe.evaluate.perplexity_answers)
        before = _read(recipe, trunk, REFERENCE, sample)
        if recipe.sft.method == "full":
            trunk.train_in_place(SFT)
        else:
            trunk.add_adapter(SFT, adapter(recipe.sft), seed=stage_seed(recipe, "sft/adapter"))
        source = sft_source(
            trees.items,
            everything=recipe.sft.loss_on == "all",
            tokens_per_step=recipe.sft.tokens_per_step,
            row_tokens=recipe.compute.row_tokens,
            epochs=recipe.sft.epochs,
            max_steps=recipe.sft.max_steps,
            seed=stage_seed(recipe, "sft/order"),
        )
        steps, shown = source.total_steps, ("loss", "learning_rate")
        rate = train(recipe, run, "sft", trunk, SftObjective(), source, recipe.sft, steps, shown=shown)
        live = _read(recipe, trunk, SFT, sample)
        after = live if recipe.sft.method == "full" else _merge_or_keep(recipe, trunk, sample, before, live)
        parts = (FINAL, FROZEN) if trunk.frozen else (FINAL,)
        _save_trunk(folder, trunk, loaded.tokenizer)
        first, second, change = perplexity_intervals(
            (before.nll, before.tokens), (after.nll, after.tokens), **resampling(recipe)
        )
        numbers = {
            **flat("perplexity_before", first),
            **flat("perplexity_after", second),
            **ends("perplexity_difference", change),
            "perplexity_unmerged": live.perplexity,
            "tokens_per_second": rate,
            "steps": steps,
        }
        merge_summary(run.folder, {"name": run.name, "confidence": recipe.evaluate.confidence, "sft": numbers})
        outputs |= {part: digest_folder(folder / part) for part in parts}


def _first_answers(trees: Sequence[Tree], count: int) -> list[Tree]:
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


def _read(recipe: Recipe, trunk: Trunk, role: str, trees: Sequence[Tree]) -> Likelihood:
    everything = recipe.data.source == (EMBEDDED_TEXT,)
    return likelihood(trunk, role, trees, everything=everything, row_tokens=recipe.compute.row_tokens)


def run_reward(recipe: Recipe, run: Run) -> None:
    """The reward model on its split, then the judge, the same way, on its own."""
    for role in ("reward", "judge"):
        if not run.is_complete(role):
            _train_reward_model(recipe, run, role)


def _train_reward_model(recipe: Recipe, run: Run, role: str) -> None:
    prepare_machine(recipe)
    with _stage(run, role, accelerator=accelerator(recipe)) as (folder, outputs):
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
        exam = examine(questions, judged, **resampling(recipe))
        save_role(folder / FINAL, trunk, role, head=reward.HEAD, trunk_hash=assembled.trunk_hash)
        audited = audit_reward_model(recipe, run, role, assembled, questions, held_out.items, judged)
        atomic_write_json(folder / AUDIT, audited)
        for sentence in audited["findings"]:
            print(f"{role}: {sentence}")
        numbers = {
            **flat("accuracy", exam.accuracy),
            **flat("longer_wins", exam.longer_wins),
            **flat("earlier_wins", exam.earlier_wins),
            **ends("over_longer", exam.over_longer),
            **ends("over_earlier", exam.over_earlier),
            "questions": exam.questions,
            "pairs": exam.pairs,
            "pairs_per_second": None if rate is None else rate * _pairs_each(trees.items),
            "steps": source.total_steps,
        }
        merge_summary(run.folder, {"confidence": recipe.evaluate.confidence, role: numbers})
        outputs |= {FINAL: digest_folder(folder / FINAL), AUDIT: digest_file(folder / AUDIT)}


def run_ppo(recipe: Recipe, run: Run) -> None:
    """PPO of the policy, or a rival of PPO, against the reward model, with a KL penalty towards the SFT model; watched
    on prompts held back from it.
    """
    if run.is_complete("ppo"):
        return
    prepare_machine(recipe)
    if recipe.ppo.method == "lora" and recipe.ppo.lora.dropout > 0:
        print("ppo: with ppo.lora.dropout above 0 the first minibatch of a round is not exact: ratios there are not 1")
    with _stage(run, "ppo", accelerator=accelerator(recipe)) as (folder, outputs):
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
        watched = watch(recipe, run, assembled, source, rounds, questions, held_back) if held_back else None
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
    with _stage(run, "dpo", accelerator=accelerator(recipe)) as (folder, outputs):
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
            watched = watch(recipe, run, assembled, source, steps, questions, held_back)
        shown, learned = ("loss", "accuracy", "margin", "learning_rate"), dpo_objective(recipe)
        rate = train(recipe, run, "dpo", trunk, learned, watched or source, section, steps, shown=shown)
        seen = leave_best(watched, trunk) if watched else {**UNWATCHED, "steps": steps}
        save_role(folder / FINAL, trunk, POLICY, head=None, trunk_hash=assembled.trunk_hash)
        pairs_per_second = None if rate is None else rate * _pairs_each(trees.items)
        merge_summary(run.folder, {"dpo": {"pairs_per_second": pairs_per_second, **seen}})
        outputs |= {FINAL: digest_folder(folder / FINAL)}


def _pairs_each(trees: Sequence[PairedTree]) -> float:
    """Pairs of a question, on average."""
    return sum(len(tree.pairs) for tree in trees) / len({tree.tree.key for tree in trees})


def run_evaluate(recipe: Recipe, run: Run) -> None:
    """The policy against the SFT model on held-out questions: rewards, judge, KL, lengths, gold, samples."""
    if run.is_complete("evaluate"):
        return
    prepare_machine(recipe)
    with _stage(run, "evaluate", accelerator=accelerator(recipe)) as (folder, outputs):
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
            side_by_side=recipe.evaluate.side_by_side,
            how=resampling(recipe),
        )
        atomic_write_json(folder / "samples.json", result.samples)
        atomic_write_json(folder / "policy.json", result.policies)
        nothing = {"best_of": dict.fromkeys(BestOfNumbers.model_fields)}  # of an exam before this one
        forgotten = _forgetting(recipe, run, assembled)
        merge_summary(run.folder, nothing | result.summary | {"ppo": {**result.summary["ppo"], **forgotten}})
        outputs |= {name: digest_file(folder / name) for name in ("samples.json", "policy.json")}


def _forgetting(recipe: Recipe, run: Run, assembled: Assembled) -> dict[str, float]:
    """What the policy makes of held-out human answers, beside the SFT model."""
    held_out = sft_trees(recipe, run, assembled.tokenizer, "eval").items
    sample = _first_answers(held_out, recipe.evaluate.perplexity_answers)
    before, after = (_read(recipe, assembled.trunk, role, sample) for role in (REFERENCE, POLICY))
    first, second, change = perplexity_intervals(
        (before.nll, before.tokens), (after.nll, after.tokens), **resampling(recipe)
    )
    return {
        "human_perplexity_before": first.mean,
        "human_perplexity_after": second.mean,
        **ends("human_perplexity_difference", change),
    }


def run_report(recipe: Recipe, run: Run) -> None:
    """Write report.html from what the stages left."""
    write_report(run.folder, defaults=default_settings(recipe.name))


@contextmanager
def _stage(
    run: Run, stage: str, *, inputs: Mapping[str, str] | None = None, accelerator: str | None = None
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Begin a stage or go on with it; yields its folder, and a dict to be filled with the hashes of what it made.

    inputs: hashes of what comes from outside the run; accelerator: the GPU that computes.

    When the block ends well the stage is complete. Its seconds add up over all the times that it was gone on with.
    """
    for remark in run.begin(stage, inputs=inputs, accelerator=accelerator):
        print(remark)
    folder, outputs = run.stage(stage), dict[str, str]()
    start = time.perf_counter()
    kept = folder / "seconds.json"
    before = _seconds(kept) if kept.exists() else 0.0
    try:
        yield folder, outputs
    finally:
        seconds = before + time.perf_counter() - start
        atomic_write_json(kept, seconds)
    merge_summary(run.folder, {"seconds": {stage: seconds}})
    run.finish(stage, outputs=outputs)


def _seconds(path: Path) -> float:
    """The seconds that a stage's clock shows."""
    seconds = read_json(path)
    if type(seconds) not in (int, float) or not 0 <= seconds < float("inf"):
        raise RunError(f"{path} holds no number of seconds; delete it and give the same command again")
    return float(seconds)


def _merge_or_keep(
    recipe: Recipe, trunk: Trunk, sample: Sequence[Tree], before: Likelihood, live: Likelihood
) -> Likelihood:
    """Merge the SFT adapter; where rounding eats more than its share of the gain, or the weights are in 4 bits, keep it
    live instead.
    """
    if trunk.quantized:
        trunk.freeze_under(SFT)
        return live
    lora, tensors = trunk.adapters[SFT], {name: tensor.clone() for name, tensor in trunk.state(SFT).items()}
    replaced = trunk.merge(SFT)
    merged = _read(recipe, trunk, REFERENCE, sample)
    if merged.perplexity - live.perplexity <= MERGE_LOSS * max(before.perplexity - live.perplexity, 0.0):
        return merged
    trunk.restore(replaced)
    trunk.add_adapter(SFT, lora, seed=0)
    trunk.load_state(SFT, tensors)
    trunk.freeze_under(SFT)
    return live


def _save_trunk(folder: Path, trunk: Trunk, tokenizer: Tokenizer) -> None:
    """Write the trunk to sft/final, where it is not there in full precision, and an adapter that stays live to
    sft/frozen.
    """
    if trunk.frozen:
        save_role(folder / FROZEN, trunk, SFT, head=None, trunk_hash="")
        trunk.drop(SFT)
    if not trunk.quantized:
        save_model(folder / FINAL, trunk.model, tokenizer)
