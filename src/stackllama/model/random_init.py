"""A Llama of a given size with random weights, for a base that is made here from nothing.

The shape follows one rule. With width d, L layers and a feed-forward of 8/3 d, a Llama has about 12 d^2 L parameters
beside its embedding; width and depth grow together at d = 48 L, d a multiple of 64, never fewer than 4 layers:

    size   width  layers  heads   feed-forward   parameters beside the embedding
    0.8m     128       4  4 x 32       352         0.80 M
    3m       256       4  8 x 32       688         3.16 M
    16m      384       9  6 x 64      1024        15.9  M
    135m     832      16  13 x 64     2224       133.   M

Heads do not share keys and values, and the embedding is tied to the output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stackllama.errors import ModelError
from stackllama.tokens.tokenizer import Tokenizer

CONTEXT = 2048
SMALLEST, LARGEST = 0.1e6, 2e9
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([mMbB])")
_WIDTH_PER_LAYER = 48


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama: `width` of the residual stream, `layers`, attention `heads` and the `feed_forward` width."""

    width: int
    layers: int
    heads: int
    feed_forward: int


def is_size(model: str) -> bool:
    """Whether a base's name is a size, such as `3m`, `0.8m` or `1b`."""
    return _SIZE.fullmatch(model) is not None


def shape_for(size: str) -> Shape:
    """The shape for a size in millions (`3m`) or billions (`1b`) of parameters, the embedding apart.

    Raises ModelError for what is no size, or is outside 0.1m to 2b.
    """
    match = _SIZE.fullmatch(size)
    parameters = float(match[1]) * (1e6 if match[2] in "mM" else 1e9) if match else 0.0
    if not SMALLEST <= parameters <= LARGEST:
        raise ModelError(f"{size!r} is no size of a model to start from nothing; give 0.1m to 2b, such as 3m")
    width = max(64, 64 * round((parameters * _WIDTH_PER_LAYER / 12) ** (1 / 3) / 64))
    return Shape(
        width=width,
        layers=max(4, round(parameters / (12 * width**2))),
        heads=width // (32 if width <= 256 else 64),
        feed_forward=16 * -(-width // 6),  # 8/3 of the width, rounded up to a multiple of 16
    )


def random_llama(
    size: str, tokenizer: Tokenizer, *, seed: int, dtype: torch.dtype, attention: str = "eager"
) -> PreTrainedModel:
    """A Llama with random weights; equal seeds give equal weights, and torch's own random state is left alone.

    The weights are drawn in fp32 and then rounded to `dtype`. Raises ModelError for an impossible size.
    """
    config = random_config(
        size,
        tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def random_config(size: str, vocabulary: int, **more: Any) -> LlamaConfig:
    """The configuration of a size with a vocabulary of so many tokens, and what `more` sets.

    Raises ModelError for an impossible size.
    """
    shape = shape_for(size)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **more,
    )
