"""Tiny random models of every supported kind, and forests to try them on."""

from __future__ import annotations

import copy
import random

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import stackllama.model.attention  # noqa: F401  (registers "forest")
from stackllama.tokens.forest import Tree

VOCABULARY = 97
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=16),
    "gemma2": Gemma2Config(
        **_SHAPE,
        head_dim=16,
        sliding_window=5,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
    ),
}


def tiny_model(kind: str = "llama", *, attention: str = "forest", seed: int = 0) -> PreTrainedModel:
    """A random fp32 model; equal seeds give equal weights whatever the attention."""
    config = copy.deepcopy(CONFIGS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        # Transformers starts with small weights: larger ones make attention sharp enough for a leak to show.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0) if parameter.ndim > 1 else None
    assert isinstance(model, PreTrainedModel)
    return model


def random_trees(seed: int, *, trees: int = 6, longest_root: int = 20) -> list[Tree]:
    """Trees of 0 to 3 branches; the first root is long enough to be cut into several attention blocks."""
    draw = random.Random(seed)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest)))

    found = [Tree(tokens(longest_root), tuple(tokens(12) for _ in range(at % 4)), at) for at in range(trees)]
    return [Tree(tuple(draw.randrange(3, VOCABULARY) for _ in range(150)), (tokens(9), tokens(140)), trees), *found]
