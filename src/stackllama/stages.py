"""One function a stage: where the recipe meets the classes.

Every function takes a resolved recipe and an open run, does its stage from wherever it stands, and returns when the stage is
complete; a complete stage is left alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np

from stackllama.assembly import (
    FINAL,
    FROZEN,
    SFT,
    adapter,
    add_trained,
    load_roles,
    load_trunk,
    precision,
    prepare_machine,
    schedule,
    stage_seed,
    weight_type,
)
from stackllama.data import store, synthetic
from stackllama.data.posts import Document, Question, read_questions
from stackllama.data.preferences import pair_questions
from stackllama.data.splits import Ledger, assign
from stackllama.evaluate.exam import compare_policies
from stackllama.evaluate.policy import perplexity
from stackllama.evaluate.preference import center_rewards, examine, judge_pairs
from stackllama.evaluate.statistics import Interval
from stackllama.files import atomic_write_json, digest_file, digest_folder, read_json
from stackllama.model.folder import save_model
from stackllama.model.load import load_base
from stackllama.model.probe import probe
from stackllama.model.role_folder import save_role
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.objectives import kl, ppo, reward
from stackllama.objectives.base import Objective
from stackllama.objectives.sft import SftObjective
from stackllama.recipe import EMBEDDED, EMBEDDED_TEXT, Optimization, Recipe, is_size
from stackllama.report.page import write_report
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY, ExperienceSource, PPOSettings
from stackllama.run import Run
from stackllama.summary import merge_summary
from stackllama.tokens.batches import Source
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import (
    Encoded,
    PairedTree,
    encode_answers,
    encode_documents,
    encode_pairs,
    encode_prompts,
    reward_source,
    sft_source,
)
from stackllama.tokens.tokenizer import Tokenizer
from stackllama.train.guard import Guard
from stackllama.train.loop import Loop, Settings
from stackllama.train.metrics import JsonlLog, Progress, progress
from stackllama.train.optim import make_optimizer

RowT = TypeVar("RowT")

MERGE_LOSS = 0.05
"""Share of SFT's gain in perplexity that rounding the merged weights may eat; beyond it the adapter stays live."""

CENTERED_ON = 256
"""Trees on whose answers a finished reward model's mean is put to 0."""


def run_data(recipe: Recipe, run: Run) -> None:
    """Dump to preference data: questions with answers, pairs and attribution, in five splits; or plain documents."""
    if run.is_complete("data"):
        return
    with _stage(run, "data") as folder:
        fractions = recipe.data.splits.model_dump()
        if recipe.data.source == (EMBEDDED_TEXT,):
            counts = _write_documents(folder, recipe, fractions)
        else:
            counts = _write_questions(folder, recipe, fractions)
        manifest = store.read_manifest(folder)
        totals = {what: manifest.total(what) for what in ("questions", "answers", "pairs", "documents")}
        splits = {key.split("/")[1]: dict(part.counts) for key, part in manifest.parts.items()}
        atomic_write_json(folder / "report.json", {**counts, **totals, "splits": splits})
        merge_summary(run.folder, {"name": run.name, "data": {what: n for what, n in totals.items() if n}})
        run.finish("data", outputs={"store": manifest.fingerprint})


def _write_documents(folder: Path, recipe: Recipe, fractions: Mapping[str, float]) -> dict[str, Any]:
    by_split: dict[str, list[Document]] = {split: [] for split, share in fractions.items() if share > 0}
    for document in synthetic.world_documents(recipe.data.documents, stage_seed(recipe, "data")):
        by_split[assign(document.site, document.id, fractions)].append(document)
    for split, documents in by_split.items():
        store.write_documents(folder, split, documents)
    return {}


def _write_questions(folder: Path, recipe: Recipe, fractions: Mapping[str, float]) -> dict[str, Any]:
    questions, counts = _read_sources(folder, recipe, fractions)
    paired, pair_counts = pair_questions(questions, max_pairs=recipe.data.max_pairs)
    path = Path(recipe.data.ledger) if recipe.data.ledger else folder / "ledger.parquet"
    ledger = Ledger.load(path)
    assignment = ledger.assign([(one.site, one.id) for one in paired], fractions=fractions)
    for split, share in fractions.items():
        if share > 0:
            chosen = [one for one in paired if assignment.splits.get((one.site, one.id)) == split]
            store.write_questions(folder, split, chosen)
    ledger.save(path)
    counts["dropped"] |= pair_counts | {"question: its cluster belongs to another split": len(assignment.dropped)}
    return counts


def _read_sources(
    folder: Path, recipe: Recipe, fractions: Mapping[str, float]
) -> tuple[list[Question], dict[str, Any]]:
    """All questions of all sources, each (site, id) once, and the counts of what was read."""
    paths = [Path(source) for source in recipe.data.source]
    site: str | None = None
    if recipe.data.source == (EMBEDDED,):
        paths, site = [folder / "dump"], synthetic.SITE
        seed = stage_seed(recipe, "data")
        synthetic.write_dump(paths[0], questions=recipe.data.questions, seed=seed, fractions=fractions)
    found: dict[tuple[str, int], Question] = {}
    counts: dict[str, Any] = {"rows": 0, "orphans": 0, "dropped": Counter(), "truncated": {}}
    for path in paths:
        size = _BytesSeen()
        with progress(f"data: {path.name}", 1, "bytes") as show:
            read, report = read_questions(
                path, site=site, allow_truncated=recipe.data.allow_truncated, progress=size.shown_by(show)
            )
        counts["rows"] += report.rows
        counts["orphans"] += report.orphans
        counts["dropped"].update(report.dropped)
        if report.truncated_at:
            counts["truncated"][path.name] = dict(report.truncated_at)
        for question in read:
            if found.setdefault((question.site, question.id), question) is not question:
                counts["dropped"]["question: its site and Id were read before"] += 1
    counts["dropped"] = dict(counts["dropped"])
    return [found[key] for key in sorted(found)], counts


class _BytesSeen:
    """Turns running totals of bytes into steps of a progress display."""

    def __init__(self) -> None:
        self._done = 0

    def shown_by(self, show: Progress) -> Callable[[int, int], None]:
        """A callback for readers that tell (done, total)."""

        def tell(done: int, total: int) -> None:
            show.total = total
            show.advance(done - self._done)
            self._done = done

        return tell


def run_sft(recipe: Recipe, run: Run) -> None:
    """Supervised fine-tuning: trains, merges the adapter into the trunk, measures perplexity before and after."""
    if run.is_complete("sft"):
        return
    prepare_machine(recipe)
    with _stage(run, "sft") as folder:
        documents = recipe.data.source == (EMBEDDED_TEXT,)
        texts = _texts(recipe, run)
        loaded = load_base(
            recipe.base.model,
            revision=recipe.base.revision,
            dtype=weight_type(recipe),
            documents=texts,
            vocabulary=recipe.base.vocabulary,
            seed=stage_seed(recipe, "base"),
            attention="forest",
        )
        probe(loaded.model)
        trees, held_out = (_sft_trees(recipe, run, loaded.tokenizer, split) for split in ("sft", "eval"))
        trunk = Trunk(loaded.model, precision=precision(recipe))
        everything = documents or recipe.sft.loss_on == "all"
        row_tokens = recipe.compute.row_tokens
        sample = held_out.items[: recipe.evaluate.perplexity_answers]
        before = perplexity(trunk, REFERENCE, sample, everything=documents, row_tokens=row_tokens)
        if recipe.sft.method == "full":
            trunk.train_in_place(SFT)
        else:
            trunk.add_adapter(SFT, adapter(recipe.sft), seed=stage_seed(recipe, "sft/adapter"))
        source = sft_source(
            trees.items,
            everything=everything,
            tokens_per_step=recipe.sft.tokens_per_step,
            row_tokens=recipe.compute.row_tokens,
            epochs=recipe.sft.epochs,
            max_steps=recipe.sft.max_steps,
            seed=stage_seed(recipe, "sft/order"),
        )
        steps = source.total_steps
        rate = _train(recipe, run, "sft", trunk, SftObjective(), source, recipe.sft, steps, shown=("loss", "learning_rate"))
        live = perplexity(trunk, SFT, sample, everything=documents, row_tokens=row_tokens)
        after = live if recipe.sft.method == "full" else _merge_or_keep(trunk, sample, before, live, row_tokens)
        _save_trunk(folder / FINAL, trunk, loaded.tokenizer)
        atomic_write_json(folder / "left_out.json", {"sft": dict(trees.left_out), "eval": dict(held_out.left_out)})
        numbers = {
            "perplexity_before": before,
            "perplexity_after": after,
            "perplexity_unmerged": live,
            "tokens_per_second": rate,
            "steps": steps,
        }
        merge_summary(run.folder, {"name": run.name, "sft": numbers})
        run.finish("sft", outputs={FINAL: digest_folder(folder / FINAL)})


def run_reward(recipe: Recipe, run: Run) -> None:
    """The reward model on its split, then the judge, the same way, on its own."""
    for role in ("reward", "judge"):
        if not run.is_complete(role):
            _train_reward_model(recipe, run, role)


def _train_reward_model(recipe: Recipe, run: Run, role: str) -> None:
    prepare_machine(recipe)
    with _stage(run, role) as folder:
        assembled = load_trunk(recipe, run.folder)
        trunk = assembled.trunk
        (_, trees), (questions, held_out) = (_paired_trees(recipe, run, assembled.tokenizer, s) for s in (role, "eval"))
        add_trained(trunk, role, recipe.reward, seed=stage_seed(recipe, f"{role}/adapter"))
        spread = 1.0 / np.sqrt(trunk.hidden_size + 1)
        trunk.add_head(role, reward.HEAD, spread=float(spread), seed=stage_seed(recipe, f"{role}/head"))
        source = reward_source(
            trees.items,
            questions_per_step=recipe.reward.questions_per_step,
            row_tokens=recipe.compute.row_tokens,
            epochs=recipe.reward.epochs,
            max_steps=recipe.reward.max_steps,
            seed=stage_seed(recipe, f"{role}/order"),
        )
        shown = ("loss", "accuracy", "learning_rate")
        objective = reward.RewardObjective(role)
        rate = _train(recipe, run, role, trunk, objective, source, recipe.reward, source.total_steps, shown=shown)
        center_rewards(trunk, role, trees.items[:CENTERED_ON], row_tokens=recipe.compute.row_tokens)
        judged = judge_pairs(trunk, role, held_out.items, row_tokens=recipe.compute.row_tokens)
        exam = examine(questions, judged, **_resampling(recipe))
        save_role(folder / FINAL, trunk, role, head=reward.HEAD, trunk_hash=assembled.trunk_hash)
        atomic_write_json(folder / "left_out.json", {role: dict(trees.left_out), "eval": dict(held_out.left_out)})
        pairs_per_question = sum(len(tree.pairs) for tree in trees.items) / len({tree.tree.key for tree in trees.items})
        numbers = {
            **_flat("accuracy", exam.accuracy),
            **_flat("longer_wins", exam.longer_wins),
            **_flat("earlier_wins", exam.earlier_wins),
            **_ends("over_longer", exam.over_longer),
            **_ends("over_earlier", exam.over_earlier),
            "questions": exam.questions,
            "pairs": exam.pairs,
            "pairs_per_second": rate * pairs_per_question,
            "steps": source.total_steps,
        }
        merge_summary(run.folder, {"confidence": recipe.evaluate.confidence, role: numbers})
        run.finish(role, outputs={FINAL: digest_folder(folder / FINAL)})


def run_ppo(recipe: Recipe, run: Run) -> None:
    """PPO of the policy against the reward model, with a KL penalty towards the SFT model."""
    if run.is_complete("ppo"):
        return
    prepare_machine(recipe)
    with _stage(run, "ppo") as folder:
        assembled = load_trunk(recipe, run.folder)
        trunk, tokenizer = assembled.trunk, assembled.tokenizer
        load_roles(assembled, run.folder, "reward")
        add_trained(trunk, POLICY, recipe.ppo, seed=stage_seed(recipe, "ppo/adapter"))
        trunk.add_head(POLICY, ppo.HEAD, spread=0.0, seed=0)
        questions = store.read_questions(run.stage("data"), "ppo")
        prompts = encode_prompts(
            tokenizer, questions, titles=recipe.data.titles, max_tokens=recipe.ppo.max_prompt_tokens
        )
        source = ExperienceSource(
            trunk,
            prompts.items,
            settings=_ppo_settings(recipe),
            sampling=Sampling(
                seed=stage_seed(recipe, "ppo/sampling"), max_new_tokens=recipe.ppo.max_new_tokens, eos_id=tokenizer.eos_id
            ),
            controller=_controller(recipe),
            estimator=kl.ESTIMATORS[recipe.ppo.kl.estimator],
            reward_role="reward",
        )
        objective = ppo.PPOObjective(
            clip=recipe.ppo.clip, value_clip=recipe.ppo.value_clip, value_coefficient=recipe.ppo.value_coefficient
        )
        steps = recipe.ppo.steps * recipe.ppo.epochs * recipe.ppo.minibatches
        rate = _train(
            recipe,
            run,
            "ppo",
            trunk,
            objective,
            source,
            recipe.ppo,
            steps,
            shown=("reward", "kl", "length", "kl_coefficient"),
            limits={"ratio_mean": recipe.ppo.ratio_guard},
        )
        save_role(folder / FINAL, trunk, POLICY, head=ppo.HEAD, trunk_hash=assembled.trunk_hash)
        atomic_write_json(folder / "left_out.json", {"ppo": dict(prompts.left_out)})
        merge_summary(run.folder, {"ppo": {"episodes_per_second": rate, "steps": recipe.ppo.steps}})
        run.finish("ppo", outputs={FINAL: digest_folder(folder / FINAL)})


def run_evaluate(recipe: Recipe, run: Run) -> None:
    """The policy against the SFT model on held-out questions: rewards, judge, KL, lengths, gold, samples side by side."""
    if run.is_complete("evaluate"):
        return
    prepare_machine(recipe)
    with _stage(run, "evaluate") as folder:
        assembled = load_trunk(recipe, run.folder)
        load_roles(assembled, run.folder, "reward", "judge", "policy")
        questions = store.read_questions(run.stage("data"), "eval")
        prompts = encode_prompts(
            assembled.tokenizer, questions, titles=recipe.data.titles, max_tokens=recipe.ppo.max_prompt_tokens
        )
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
            row_tokens=recipe.compute.row_tokens,
            side_by_side=recipe.evaluate.side_by_side,
            **_resampling(recipe),
        )
        atomic_write_json(folder / "samples.json", result.samples)
        atomic_write_json(folder / "policy.json", result.policies)
        merge_summary(run.folder, result.summary)
        outputs = {name: digest_file(folder / name) for name in ("samples.json", "policy.json")}
        run.finish("evaluate", outputs=outputs)


def run_report(recipe: Recipe, run: Run) -> None:
    """Write report.html from what the stages left."""
    write_report(run.folder)


@contextmanager
def _stage(run: Run, stage: str, inputs: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Begin a stage, yield its folder, and add up its seconds, over all the times that it was gone on with."""
    for remark in run.begin(stage, inputs=inputs):
        print(remark)
    start = time.perf_counter()
    kept = run.stage(stage) / "seconds.json"
    before = float(read_json(kept)) if kept.exists() else 0.0
    try:
        yield run.stage(stage)
    finally:
        seconds = before + time.perf_counter() - start
        atomic_write_json(kept, seconds)
    merge_summary(run.folder, {"seconds": {stage: seconds}})


def _train(
    recipe: Recipe,
    run: Run,
    stage: str,
    trunk: Trunk,
    objective: Objective[RowT],
    source: Source[RowT],
    section: Optimization,
    steps: int,
    *,
    shown: Sequence[str],
    limits: Mapping[str, float] | None = None,
) -> float:
    """Train one role to its source's end; gives the rate in the source's unit per second, of this process."""
    folder = run.stage(stage)
    loop = Loop(
        trunk=trunk,
        objective=objective,
        source=source,
        optimizer=make_optimizer(
            trunk.trainable(objective.role),
            learning_rate=section.learning_rate,
            betas=section.betas,
            weight_decay=section.weight_decay,
        ),
        learning_rate=schedule(section, steps),
        guard=Guard(limits),
        settings=Settings(section.clip_norm, recipe.compute.checkpoint_steps, recipe.compute.log_steps),
        folder=folder / "checkpoints",
        log=JsonlLog(folder / "metrics.jsonl"),
        title=stage,
        shown=shown,
    )
    start = time.perf_counter()
    done = loop.run()
    return done / max(time.perf_counter() - start, 1e-9)


def _texts(recipe: Recipe, run: Run) -> list[str]:
    """Texts of the SFT split, for training a tokenizer when the base is a size; none otherwise."""
    if not is_size(recipe.base.model):
        return []
    folder = run.stage("data")
    if recipe.data.source == (EMBEDDED_TEXT,):
        return [document.text for document in store.read_documents(folder, "sft")]
    questions = store.read_questions(folder, "sft")
    return [text for one in questions for text in (one.title, one.text, *(answer.text for answer in one.answers))]


def _sft_trees(recipe: Recipe, run: Run, tokenizer: Tokenizer, split: str) -> Encoded[Tree]:
    limit = recipe.sft.max_tokens
    if recipe.data.source == (EMBEDDED_TEXT,):
        return encode_documents(tokenizer, store.read_documents(run.stage("data"), split), max_tokens=limit)
    questions = store.read_questions(run.stage("data"), split)
    return encode_answers(tokenizer, questions, titles=recipe.data.titles, answers=recipe.sft.answers, max_tokens=limit)


def _paired_trees(
    recipe: Recipe, run: Run, tokenizer: Tokenizer, split: str
) -> tuple[list[Question], Encoded[PairedTree]]:
    questions = store.read_questions(run.stage("data"), split)
    trees = encode_pairs(
        tokenizer,
        questions,
        titles=recipe.data.titles,
        answers_per_question=recipe.reward.answers_per_question,
        max_question_tokens=recipe.reward.max_question_tokens,
        max_answer_tokens=recipe.reward.max_answer_tokens,
        row_tokens=recipe.compute.row_tokens,
        seed=stage_seed(recipe, "reward/answers"),
    )
    return questions, trees


def _merge_or_keep(trunk: Trunk, sample: Sequence[Tree], before: float, live: float, row_tokens: int) -> float:
    """Merge the SFT adapter; where rounding eats more than its share of the gain in perplexity, keep it live instead."""
    lora, tensors = trunk.adapters[SFT], {name: tensor.clone() for name, tensor in trunk.state(SFT).items()}
    replaced = trunk.merge(SFT)
    merged = perplexity(trunk, REFERENCE, sample, everything=False, row_tokens=row_tokens)
    if merged - live <= MERGE_LOSS * max(before - live, 0.0):
        return merged
    trunk.restore(replaced)
    trunk.add_adapter(SFT, lora, seed=0)
    trunk.load_state(SFT, tensors)
    trunk.freeze_under(SFT)
    return live


def _save_trunk(folder: Path, trunk: Trunk, tokenizer: Tokenizer) -> None:
    """Write the trunk to sft/final, and an adapter that stays live to sft/frozen."""
    if trunk.frozen:
        save_role(folder / FROZEN, trunk, SFT, head=None, trunk_hash="")
        trunk.drop(SFT)
    save_model(folder / FINAL, trunk.model, tokenizer)


def _ppo_settings(recipe: Recipe) -> PPOSettings:
    section = recipe.ppo
    return PPOSettings(
        rounds=section.steps,
        prompts=section.prompts_per_step,
        samples=section.samples_per_prompt,
        epochs=section.epochs,
        minibatches=section.minibatches,
        gamma=section.gamma,
        gae_lambda=section.gae_lambda,
        whiten=section.whiten,
        missing_eos_penalty=section.missing_eos_penalty,
        kl_stop=section.policy_kl_stop,
        row_tokens=recipe.compute.row_tokens,
    )


def _controller(recipe: Recipe) -> kl.Controller:
    section = recipe.ppo.kl
    if section.controller == "fixed":
        return kl.FixedController(section.coefficient)
    return kl.AdaptiveController(section.coefficient, section.target, section.horizon)


class _Resampling(TypedDict):
    resamples: int
    confidence: float
    seed: int


def _resampling(recipe: Recipe) -> _Resampling:
    return {
        "resamples": recipe.evaluate.resamples,
        "confidence": recipe.evaluate.confidence,
        "seed": stage_seed(recipe, "evaluate/resampling"),
    }


def _ends(name: str, found: Interval) -> dict[str, float]:
    return {f"{name}_low": found.low, f"{name}_high": found.high}


def _flat(name: str, found: Interval) -> dict[str, float]:
    return {name: found.mean, **_ends(name, found)}
