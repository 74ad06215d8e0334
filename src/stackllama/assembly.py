"""Putting a run's parts together: from recipe values and finished stages to a trunk with its roles.

Shared by the stages, the chat and the scorer. Recipe models end here: everything below gets plain values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from stackllama.errors import ModelError
from stackllama.files import digest_folder
from stackllama.model.folder import load_model
from stackllama.model.role_folder import load_role
from stackllama.model.roles import LoRA, Trunk
from stackllama.recipe import Optimization, Recipe
from stackllama.run import available_threads
from stackllama.tokens.tokenizer import Tokenizer
from stackllama.train.optim import learning_rate_at

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
    """Set the thread count that the recipe asks for."""
    torch.set_num_threads(recipe.compute.threads or available_threads())


def precision(recipe: Recipe) -> torch.dtype:
    """Type of the matrix products: bf16 where asked for, or where the processor multiplies it in hardware."""
    asked = recipe.compute.dtype
    if asked == "auto":
        fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def weight_type(recipe: Recipe) -> torch.dtype:
    """Type in which the trunk is kept: fp32 as soon as one stage trains all weights, since its copies must start equal."""
    full = any(section.method == "full" for section in (recipe.sft, recipe.reward, recipe.ppo))
    return torch.float32 if full else precision(recipe)


def stage_seed(recipe: Recipe, stage: str) -> int:
    """A seed for one purpose, different for each and fixed by the recipe's."""
    digest = hashlib.blake2b(f"{recipe.seed}/{stage}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


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
            min(step, steps - 1), total_steps=steps, warmup_steps=warmup, kind=section.schedule, peak=section.learning_rate
        )

    return rate


def load_trunk(recipe: Recipe, folder: Path) -> Assembled:
    """The trunk that the SFT stage of the run in ``folder`` left, with its adapter live where it was not merged.

    Raises:
        ModelError: when SFT has not ended, or its files are damaged.
    """
    final = folder / SFT / FINAL
    if not final.is_dir():
        raise ModelError(f"{final} does not exist: this run has no SFT model yet; run the sft stage first")
    loaded = load_model(final, weight_type(recipe), attention="forest")
    digest = digest_folder(final)
    trunk = Trunk(loaded.model, precision=precision(recipe))
    frozen = folder / SFT / FROZEN
    if frozen.is_dir():
        digest += digest_folder(frozen)
        load_role(frozen, trunk, SFT, trunk_hash="")
        trunk.freeze_under(SFT)
    return Assembled(trunk, loaded.tokenizer, digest)


def load_roles(assembled: Assembled, folder: Path, *roles: str) -> None:
    """Add trained roles of the run in ``folder``: "policy" from the ppo stage, "reward" and "judge" from their own."""
    for role in roles:
        stage = {"policy": "ppo"}.get(role, role)
        load_role(folder / stage / FINAL, assembled.trunk, role, trunk_hash=assembled.trunk_hash)
