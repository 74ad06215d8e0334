"""The SFT stage: it trains, merges the adapter into the trunk, and measures what merging cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stackllama.assembly import (
    FINAL,
    FROZEN,
    SFT,
    accelerator,
    adapter,
    base_hashes,
    base_trunk,
    check_enough,
    check_fits,
    device,
    prepare_machine,
    resampling,
    sft_trees,
    stage_seed,
    train,
    training_texts,
    weight_type,
)
from stackllama.evaluate.policy import Likelihood
from stackllama.evaluate.statistics import ends, flat, perplexity_intervals
from stackllama.files import atomic_write_json, digest_folder
from stackllama.model.folder import save_model
from stackllama.model.load import load_base
from stackllama.model.probe import probe
from stackllama.model.role_folder import save_role
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.objectives.sft import SftObjective
from stackllama.recipe import Recipe
from stackllama.run import Run
from stackllama.stages.opening import open_stage
from stackllama.stages.perplexity import first_answers, read_answers
from stackllama.summary import merge_summary
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import sft_source
from stackllama.tokens.tokenizer import Tokenizer

MERGE_LOSS = 0.05
"""Share of SFT's gain in perplexity that rounding the merged weights may eat; beyond it the adapter stays live."""


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
    with open_stage(run, "sft", inputs=hashes, accelerator=accelerator(recipe)) as (folder, outputs):
        trees, held_out = (sft_trees(recipe, run, loaded.tokenizer, split) for split in ("sft", "eval"))
        atomic_write_json(folder / "left_out.json", {"sft": dict(trees.left_out), "eval": dict(held_out.left_out)})
        if recipe.base.quantization != "off":
            # What is unpacked and packed again has other bits, so the stages after this one pack these weights too.
            save_model(folder / FINAL, loaded.model, loaded.tokenizer)
        trunk = base_trunk(recipe, loaded.model)
        sample = first_answers(held_out.items, recipe.evaluate.perplexity_answers)
        before = read_answers(recipe, trunk, REFERENCE, sample)
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
        live = read_answers(recipe, trunk, SFT, sample)
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
    merged = read_answers(recipe, trunk, REFERENCE, sample)
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
