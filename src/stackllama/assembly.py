"""Putting a run's parts together: from recipe values and finished stages to a trunk with its roles.

Shared by the stages, the chat and the scorer. Recipe models end here: everything below gets plain values.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from stackllama.data.dump.archive import digest_dump
from stackllama.data.interchange import reading as interchange_read
from stackllama.data.posts import Question
from stackllama.data.store import store
from stackllama.environment import processor_features
from stackllama.errors import DataError, ModelError, RecipeError
from stackllama.evaluate.statistics import Resampling
from stackllama.evaluate.watch import hold_back
from stackllama.files import digest_folder
from stackllama.model import nf4
from stackllama.model.folder import LoadedBase, load_model
from stackllama.model.role_folder import load_role
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives.base import Objective
from stackllama.recipe import EMBEDDED, EMBEDDED_TEXT, Recipe, is_size
from stackllama.recipe_training import Optimization
from stackllama.rollout import vllm
from stackllama.run import COMMANDS, Run, available_threads, policy_stage, stage_outputs
from stackllama.tokens.batches import Source
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import (
    Encoded,
    PairedTree,
    encode_answers,
    encode_documents,
    encode_pairs,
    encode_prompts,
)
from stackllama.tokens.template import FINGERPRINT
from stackllama.tokens.tokenizer import Tokenizer
from stackllama.train.guard import Guard, Sensitivity
from stackllama.train.loop import Loop, Settings, trained
from stackllama.train.metrics import JsonlLog
from stackllama.train.optim import learning_rate_at, make_optimizer
from stackllama.train.trackers import check_installed, tracked

RowT = TypeVar("RowT")

BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
"""Features of processors that multiply bf16 in hardware; without them bf16 is emulated, and slower than fp32."""
FIRST_WITH_BF16 = (8, 0)
"""Compute capability from which GPUs of NVIDIA multiply bf16 in hardware."""

FINAL = "final"
FROZEN = "frozen"
SFT = "sft"


@dataclass(frozen=True, slots=True)
class Assembled:
    """A run's trunk after SFT, its tokenizer, and the hash that roles on it carry."""

    trunk: Trunk
    tokenizer: Tokenizer
    trunk_hash: str


def prepare_machine(recipe: Recipe) -> None:
    """Set the thread count that the recipe asks for.

    Raises:
        ModelError: when the recipe asks for 4-bit weights, or for vLLM, and the package for them is not installed.
    """
    if recipe.base.quantization == "nf4":
        nf4.check_installed()
    if "ppo" in recipe.stages and recipe.ppo.sampler == "vllm":
        vllm.check_installed()
    check_installed(recipe.track)
    torch.set_num_threads(recipe.compute.threads or available_threads())


def device(recipe: Recipe) -> torch.device:
    """Where models are trained and sampled: on the GPU where one is asked for, or there is one.

    Raises:
        RecipeError: when a GPU is asked for and torch sees none.
    """
    asked, there = recipe.compute.device, torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise RecipeError(
            f"compute.device is cuda, but torch {torch.__version__} sees no GPU here; set it to auto or cpu, or "
            "install a build of torch with CUDA and a driver that fits it"
        )
    return torch.device("cuda" if there and asked != "cpu" else "cpu")


def accelerator(recipe: Recipe) -> str | None:
    """The name of the GPU that is used; None on the CPU."""
    return torch.cuda.get_device_name() if device(recipe).type == "cuda" else None


def precision(recipe: Recipe) -> torch.dtype:
    """Type of the matrix products: bf16 where asked for, or where the device multiplies it in hardware."""
    asked = recipe.compute.dtype
    if asked == "auto":
        return torch.bfloat16 if _multiplies_bf16(device(recipe)) else torch.float32
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16
    return bool(BF16_FEATURES & set(processor_features()))


def weight_type(recipe: Recipe) -> torch.dtype:
    """Type in which the trunk is kept: fp32 as soon as one stage trains all weights: its copies must start equal."""
    sections = (recipe.sft, recipe.reward, recipe.ppo, recipe.dpo)  # whichever makes the policy: SFT comes before it
    full = any(section.method == "full" for section in sections)
    return torch.float32 if full else precision(recipe)


def stage_seed(recipe: Recipe, stage: str) -> int:
    """A seed for one purpose, different for each and fixed by the recipe's."""
    digest = hashlib.blake2b(f"{recipe.seed}/{stage}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """Source -> hash of the files that are read of it; a source that is generated is named by the recipe alone.

    Raises:
        DumpError: when there is no dump, or one that cannot be read.
    """
    if recipe.data.source in ((EMBEDDED,), (EMBEDDED_TEXT,)):
        return {}
    return {
        source: interchange_read.digest(source) if interchange_read.is_records(source) else digest_dump(Path(source))
        for source in recipe.data.source
    }


def base_hashes(base: LoadedBase) -> dict[str, str]:
    """What SFT starts from: hashes of the weights, the tokenizer and the template."""
    weights = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return {"base": weights.hexdigest(), "tokenizer": base.tokenizer.fingerprint, "template": FINGERPRINT}


def check_fits(recipe: Recipe, base: LoadedBase) -> None:
    """Raise ModelError where a length of the recipe is beyond the base model's context."""
    reward, ppo = recipe.reward, recipe.ppo
    lengths = {"sft.max_tokens": recipe.sft.max_tokens}
    if recipe.data.source != (EMBEDDED_TEXT,):
        # An answer that is cut off gets one more token before it is scored, its EOS.
        new = max(ppo.max_new_tokens, recipe.evaluate.max_new_tokens or 0) + 1
        lengths |= {
            "reward.max_question_tokens + reward.max_answer_tokens": reward.max_question_tokens
            + reward.max_answer_tokens,
            "ppo.max_prompt_tokens + max_new_tokens + 1": ppo.max_prompt_tokens + new,
        }
    for key, length in lengths.items():
        if length > base.context:
            raise ModelError(
                f"{key} is {length}, but {base.source} has a context of {base.context} tokens; lower it, or use a base "
                "model with a longer context"
            )


def check_enough(recipe: Recipe, run: Run, tokenizer: Tokenizer) -> None:
    """Raise DataError, before anything is trained, where a later stage would find too little to work on."""
    answered = {tree.key for tree in sft_trees(recipe, run, tokenizer, "eval").items}
    needs = {"questions with an answer in the eval split": (len(answered), 2)}
    if recipe.data.source != (EMBEDDED_TEXT,):
        for split in ("reward", "judge", "eval"):
            most = recipe.reward.answers_per_question
            pairs = paired_trees(recipe, run, tokenizer, split, answers_per_question=most)[1]
            found = {one.tree.key for one in pairs.items}
            needs[f"questions with a pair in the {split} split"] = (len(found), 2)
        if recipe.policy == "ppo":
            trained, watched = watched_prompts(recipe, prompt_trees(recipe, run, tokenizer, "ppo")[1].items)
            left = f" besides the {len(watched)} that are held back by watch.prompts" if watched else ""
            needs[f"prompts in the ppo split{left}"] = (len(trained), recipe.ppo.prompts_per_step)
        elif recipe.watch.every is not None:
            watched_prompts(recipe, prompt_trees(recipe, run, tokenizer, "ppo")[1].items)
        needs["prompts in the eval split"] = (len(prompt_trees(recipe, run, tokenizer, "eval")[1].items), 2)
    for what, (found_count, least) in needs.items():
        if found_count < least:
            raise DataError(
                f"{what}: {found_count} that fit the limits, at least {least} are needed; give more data, a larger "
                "share in data.splits, or longer limits (*.max_*_tokens)"
            )


def add_trained(trunk: Trunk, role: str, section: Optimization, *, seed: int) -> None:
    """Add a role that is about to be trained, by adapter or in full, as its section of the recipe says."""
    if section.method == "full":
        trunk.add_copy(role)
    else:
        trunk.add_adapter(role, adapter(section), seed=seed)


def adapter(section: Optimization) -> LoRA:
    """The adapter that a section describes."""
    lora = section.lora
    return LoRA(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets))


def schedule(section: Optimization, steps: int) -> Callable[[int], float]:
    """Learning rate of each step of a stage of so many steps."""
    warmup = round(section.warmup * steps)

    def rate(step: int) -> float:
        return learning_rate_at(
            min(step, steps - 1),
            total_steps=steps,
            warmup_steps=warmup,
            kind=section.schedule,
            peak=section.learning_rate,
        )

    return rate


def base_trunk(recipe: Recipe, model: PreTrainedModel) -> Trunk:
    """A trunk of a loaded model as the recipe wants it: in 4 bits or not, on its device, activations kept or not."""
    if recipe.base.quantization == "nf4":
        nf4.quantize(model, device(recipe))
    trunk = Trunk(model.to(device(recipe)), precision=precision(recipe))
    if recipe.compute.recompute_activations:
        trunk.recompute_activations()
    return trunk


def load_trunk(recipe: Recipe, folder: Path) -> Assembled:
    """The trunk that the SFT stage of the run in ``folder`` left, with its adapter live where it was not merged.

    Raises:
        RunError: when SFT has not ended.
        ModelError: when its files are damaged, or are not those that it left.
    """
    final, frozen = folder / SFT / FINAL, folder / SFT / FROZEN
    digest = recorded_digest(folder, SFT, FINAL)
    loaded = load_model(final, weight_type(recipe), attention="forest")
    trunk = base_trunk(recipe, loaded.model)
    if frozen.is_dir() or FROZEN in stage_outputs(folder, SFT):
        digest += recorded_digest(folder, SFT, FROZEN)
        load_role(frozen, trunk, SFT, trunk_hash="")
        trunk.freeze_under(SFT)
    return Assembled(trunk, loaded.tokenizer, digest)


def load_roles(assembled: Assembled, folder: Path, *roles: str) -> None:
    """Add trained roles of the run in ``folder``: "reward" and "judge" from stages of that name, "policy" from the one
    that makes it.

    Raises:
        RunError: when a role's stage has not ended.
        ModelError: when its files are damaged, or are not those that it left.
    """
    for role in roles:
        stage = policy_stage(folder) if role == "policy" else role
        recorded_digest(folder, stage, FINAL)
        load_role(folder / stage / FINAL, assembled.trunk, role, trunk_hash=assembled.trunk_hash)


def recorded_digest(folder: Path, stage: str, part: str) -> str:
    """Hash of a part of a complete stage of the run in ``folder``, such as ``final``.

    Raises ModelError where it is not the hash that the stage noted: the lineage would tell what is not so.
    """
    noted, found = stage_outputs(folder, stage).get(part, "none"), digest_folder(folder / stage / part)
    if found != noted:
        raise ModelError(
            f"{folder / stage / part} is not what the stage left there (hash {found[:12]}, noted {noted[:12]}); delete "
            f"{folder / stage} and run {COMMANDS[stage]} again"
        )
    return found


def training_texts(recipe: Recipe, run: Run) -> list[str]:
    """Texts of the SFT split, for training a tokenizer when the base is a size; none otherwise."""
    if not is_size(recipe.base.model):
        return []
    folder = run.stage("data")
    if recipe.data.source == (EMBEDDED_TEXT,):
        return [document.text for document in store.read_documents(folder, "sft")]
    questions = store.read_questions(folder, "sft")
    return [text for one in questions for text in (one.title, one.text, *(answer.text for answer in one.answers))]


def sft_trees(recipe: Recipe, run: Run, tokenizer: Tokenizer, split: str) -> Encoded[Tree]:
    """What SFT learns from a split, or is examined on: questions with answers, or plain documents."""
    limit = recipe.sft.max_tokens
    if recipe.data.source == (EMBEDDED_TEXT,):
        return encode_documents(tokenizer, store.read_documents(run.stage("data"), split), max_tokens=limit)
    questions = store.read_questions(run.stage("data"), split)
    return encode_answers(tokenizer, questions, titles=recipe.data.titles, answers=recipe.sft.answers, max_tokens=limit)


def paired_trees(
    recipe: Recipe, run: Run, tokenizer: Tokenizer, split: str, *, answers_per_question: int
) -> tuple[list[Question], Encoded[PairedTree]]:
    """The questions of a split, and their pairs encoded for a reward model or for DPO."""
    questions = store.read_questions(run.stage("data"), split)
    return questions, encode_paired(recipe, tokenizer, questions, answers_per_question=answers_per_question)


def encode_paired(
    recipe: Recipe, tokenizer: Tokenizer, questions: Sequence[Question], *, answers_per_question: int
) -> Encoded[PairedTree]:
    """Pairs of these questions, encoded within the recipe's limits."""
    return encode_pairs(
        tokenizer,
        questions,
        titles=recipe.data.titles,
        answers_per_question=answers_per_question,
        max_question_tokens=recipe.reward.max_question_tokens,
        max_answer_tokens=recipe.reward.max_answer_tokens,
        row_tokens=recipe.compute.row_tokens,
        by_pairs=recipe.data.preferences.weight == "pairs",
        seed=stage_seed(recipe, "reward/answers"),
    )


def prompt_trees(recipe: Recipe, run: Run, tokenizer: Tokenizer, split: str) -> tuple[list[Question], Encoded[Tree]]:
    """The questions of a split, and those that fit as prompts."""
    questions = store.read_questions(run.stage("data"), split)
    return questions, encode_prompts(
        tokenizer, questions, titles=recipe.data.titles, max_tokens=recipe.ppo.max_prompt_tokens
    )


def watched_prompts(recipe: Recipe, prompts: Sequence[Tree]) -> tuple[list[Tree], list[Tree]]:
    """(prompts that PPO trains on, prompts on which the policy is watched); none of the latter where that is off.

    Raises:
        DataError: where there are too few to hold any back.
    """
    if recipe.watch.every is None:
        return list(prompts), []
    return hold_back(prompts, recipe.watch.prompts, seed=stage_seed(recipe, "ppo/watch/prompts"))


def sensitivity(recipe: Recipe) -> Sensitivity | None:
    """How the guard compares steps; None where it does not."""
    guard = recipe.guard
    if not guard.watch:
        return None
    return Sensitivity(guard.window, guard.warmup, guard.clip, guard.skip, guard.rewind_after, guard.rewinds)


def resampling(recipe: Recipe) -> Resampling:
    """The recipe's keywords of every interval."""
    return {
        "resamples": recipe.evaluate.resamples,
        "confidence": recipe.evaluate.confidence,
        "seed": stage_seed(recipe, "evaluate/resampling"),
    }


def train(
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
    beside: Sequence[Objective[RowT]] = (),
) -> float | None:
    """Train one role, and those of the objectives beside, to its source's end; gives the rate in the source's unit per
    second, of this process; None where an earlier one had done it all.
    """
    folder = run.stage(stage)
    torch.manual_seed(stage_seed(recipe, f"{stage}/dropout"))  # whatever was drawn before, in this process or another
    written = JsonlLog(folder / "metrics.jsonl")
    start = time.perf_counter()
    with tracked(written, recipe.track, run.folder, stage) as log:
        done = Loop(
            trunk=trunk,
            objective=objective,
            source=source,
            optimizer=make_optimizer(
                trained(trunk, objective, beside),
                learning_rate=section.learning_rate,
                betas=section.betas,
                weight_decay=section.weight_decay,
            ),
            learning_rate=schedule(section, steps),
            guard=Guard(limits, sensitivity(recipe)),
            settings=Settings(section.clip_norm, recipe.compute.checkpoint_steps, recipe.compute.log_steps),
            folder=folder / "checkpoints",
            log=log,
            title=stage,
            shown=shown,
            beside=beside,
        ).run()
    return done / max(time.perf_counter() - start, 1e-9) if done else None
