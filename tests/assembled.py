"""A tiny run, put together: a random model with a context of 64 tokens, its tokenizer and a reward model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import stackllama.model.attention  # noqa: F401  (registers "forest")
from stackllama.assembly import Assembled
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives import reward
from stackllama.recipe_load import load_recipe, to_yaml
from stackllama.tokens.tokenizer import Tokenizer

CONTEXT = 64
VOCABULARY = 300


def assembled_run() -> Assembled:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = Trunk(AutoModelForCausalLM.from_config(config, attn_implementation="forest"), precision=torch.float32)
    trunk.add_adapter("reward", LoRA(2, 4.0, 0.0, ("q_proj",)), seed=1)
    trunk.add_head("reward", reward.HEAD, spread=0.1, seed=1)
    tokenizer = Tokenizer.train(["Question: what is a hop?\n\nAnswer: a plant"] * 3, VOCABULARY)
    return Assembled(trunk, tokenizer, "hash")


def speak_from(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `chat` or `scoring` find the tiny run in `folder`."""
    (folder / "recipe.yaml").write_text(to_yaml(load_recipe("quickstart")), encoding="utf-8")
    monkeypatch.setattr(module, "prepare_machine", lambda recipe: None)
    monkeypatch.setattr(module, "load_trunk", lambda recipe, folder: assembled_run())
    monkeypatch.setattr(module, "load_roles", lambda assembled, folder, *roles: None)
