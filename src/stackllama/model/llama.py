"""The forward of Llama-shaped decoders, with fewer passes over memory and fewer kept tensors than transformers' own.

The weights, the adapters and the configuration stay where transformers and peft have them; only the way through them is
ours (`fused.py`). Decoders of another shape go through their own forward, more slowly; the probe and the tests hold
both ways together.

Legend: R sequences of S tokens, N = R S, D hidden size, H heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from stackllama.model.attention import ForestPlan, KeyValueCache, forest_attention
from stackllama.model.fused import Gated, Given, Layer, Made, Normed, linears, made_input, rotated
from stackllama.model.nf4 import NF4Linear

FAMILIES: dict[str, Callable[[Any], int | None]] = {
    "llama": lambda _: None,  # whatever its configuration may say beside
    "mistral": lambda attention: attention.config.sliding_window,
    "qwen2": lambda attention: attention.sliding_window,
}
"""Model types whose layers are: norm, attention with rotary positions, norm, gated feed-forward; each added to the
residual stream as it is. And where each has the window of a layer's attention.
"""


def reads(decoder: PreTrainedModel) -> bool:
    """Whether this forward is that of the decoder."""
    return decoder.config.model_type in FAMILIES and decoder.config.hidden_act == "silu"


CastLayers = dict[tuple[nn.Module, bool], Layer]
"""Linear modules, with and without gradients, as `linears` takes them: good until a weight changes. 4-bit weights are
in it as they are, packed.
"""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass through a decoder works with: the precision of the matrix products, what attention is given, and the
    layers that were cast to the precision before.
    """

    precision: torch.dtype
    plan: ForestPlan | None
    cache: KeyValueCache | None
    cast: CastLayers


def hidden_states(
    decoder: Any, tokens_RS: Tensor, positions_RS: Tensor, how: Pass, places_N: Tensor | None = None
) -> Tensor:
    """Final hidden states (R, S, D); or, of the one row of a forest, those at some places (1, N, D)."""
    hidden_RSD = decoder.embed_tokens(tokens_RS)
    # What turns queries and keys: worked out in fp32, used in the precision that these have.
    cos_RSE, sin_RSE = decoder.rotary_emb(hidden_RSD.new_empty(0, dtype=how.precision), position_ids=positions_RS)
    turn = (cos_RSE.flatten(0, 1), sin_RSE.flatten(0, 1))
    for number, layer in enumerate(decoder.layers):
        wanted = places_N if number == len(decoder.layers) - 1 else None
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            hidden_RSD = checkpoint(_layer, layer, hidden_RSD, turn, how, wanted, use_reentrant=False)
        else:
            hidden_RSD = _layer(layer, hidden_RSD, turn, how, wanted)
    final: Tensor = decoder.norm(hidden_RSD)
    return final


def _layer(layer: Any, hidden_RSD: Tensor, turn: tuple[Tensor, Tensor], how: Pass, places_N: Tensor | None) -> Tensor:
    rows, steps, width = hidden_RSD.shape
    feed, norm = layer.mlp, layer.post_attention_layernorm
    hidden_ND = hidden_RSD.flatten(0, 1)
    attended_ND = _attended(layer, hidden_ND, (rows, steps), turn, how)
    if places_N is not None:
        hidden_ND, attended_ND = hidden_ND[places_N], attended_ND[places_N]
    (mixed_ND,) = _through(Given(), (attended_ND,), how, layer.self_attn.o_proj)
    hidden_ND = hidden_ND + mixed_ND
    normed = Normed(norm.variance_epsilon, how.precision)
    gate_NF, up_NF = _through(normed, (hidden_ND, norm.weight), how, feed.gate_proj, feed.up_proj)
    (fed_ND,) = _through(Gated(), (gate_NF, up_NF), how, feed.down_proj)
    return (hidden_ND + fed_ND).view(rows, -1, width)


def _attended(layer: Any, hidden_ND: Tensor, shape: tuple[int, int], turn: tuple[Tensor, Tensor], how: Pass) -> Tensor:
    """What attention gathers (N, H E), before its output layer."""
    attention, norm = layer.self_attn, layer.input_layernorm
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    normed = Normed(norm.variance_epsilon, how.precision)
    projected = _through(normed, (hidden_ND, norm.weight), how, *projections)
    query, key, value = (one.view(len(one), -1, attention.head_dim) for one in projected)
    query, key, value = (
        one.unflatten(0, shape).transpose(1, 2) for one in (rotated(query, *turn), rotated(key, *turn), value)
    )
    attended, _ = forest_attention(
        attention,
        query,
        key,
        value,
        None,
        scaling=attention.scaling,
        dropout=attention.attention_dropout if attention.training else 0.0,
        forest_plan=how.plan,
        key_value_cache=how.cache,
        sliding_window=FAMILIES[attention.config.model_type](attention),
    )
    return attended.reshape(len(hidden_ND), -1)


def _through(made: Made, sources: tuple[Tensor, ...], how: Pass, *modules: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of linear modules, those of peft's with the adapters that are switched on."""
    if any(_drops(module) for module in modules):  # every adapter sees another input then: peft's own way
        input_ND = made_input(made, sources)
        return tuple(module(input_ND) for module in modules)
    graded = torch.is_grad_enabled()
    for module in modules:
        if (module, graded) not in how.cast:
            how.cast[module, graded] = _layer_of(module, how.precision)
    return linears(made, sources, [how.cast[module, graded] for module in modules])


def _active(module: nn.Module) -> list[str]:
    if not isinstance(module, LoraLayer) or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _drops(module: Any) -> bool:
    dropouts = (module.lora_dropout[name] for name in _active(module))
    return any(isinstance(one, nn.Dropout) and one.p > 0 and one.training for one in dropouts)


def _layer_of(module: Any, precision: torch.dtype) -> Layer:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    weight = base if isinstance(base, NF4Linear) else base.weight.to(precision)
    bias = None if base.bias is None else base.bias.to(precision)
    adapters = {
        name: (
            module.lora_B[name].weight.to(precision),
            module.lora_A[name].weight.to(precision),
            float(module.scaling[name]),
        )
        for name in _active(module)
    }
    return Layer(weight, bias, adapters)
