"""Which models can read forests: causal softmax decoders with rotary positions that leave attention to an interface.

The forest's attention replaces a model's own, so whatever a model does beside softmax attention, or keys to a token's
place in the row, would go wrong in silence. It is refused here, by name, from the configuration alone and before any
weight is read. Sliding windows, soft caps and mixtures of experts are fine. The probe after loading catches what a
configuration hides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stackllama.errors import ModelError

SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention"})

# Their frequencies, or the quality of the model, change beyond the length of pretraining.
_LENGTH_BOUND_ROPE = frozenset({"dynamic", "longrope", "yarn"})

_LAYER_WORDS = {
    "chunked_attention": "chunked attention (a token's view depends on its place in the row)",
    "linear_attention": "linear or recurrent layers (a state runs along the row, through every text in it)",
    "conv": "convolutions over the row (they read across the borders of texts)",
    "hybrid": "layers that mix attention with a recurrent state (it runs through every text in the row)",
}

# Families whose configuration does not show it.
_REFUSED_FAMILIES = {
    "bloom": "ALiBi positions",
    "mpt": "ALiBi positions",
    "mamba": "recurrent layers (Mamba: a state runs along the row, through every text in it)",
    "mamba2": "recurrent layers (Mamba: a state runs along the row, through every text in it)",
    "falcon_mamba": "recurrent layers (Mamba: a state runs along the row, through every text in it)",
    "rwkv": "recurrent layers (RWKV: a state runs along the row, through every text in it)",
    "xlstm": "recurrent layers (xLSTM: a state runs along the row, through every text in it)",
    "lfm2": _LAYER_WORDS["conv"],
    "lfm2_moe": _LAYER_WORDS["conv"],
}

_ADVICE = "choose a decoder with rotary positions, such as Llama, Mistral, Qwen 2 or 3, Gemma 2, Phi 3, OLMo or SmolLM"


def check_supported(config: PretrainedConfig, *, length: int | None = None) -> None:
    """Raise ModelError, naming the model type and the reason, where a model cannot read forests.

    `length` (tokens of the longest tree path) is checked against `usable_context` where it is given.
    """
    reason = _reason(config)
    if reason is not None:
        raise ModelError(f"models of type {config.model_type!r} cannot be trained here: {reason}; {_ADVICE}")
    context = usable_context(config)
    if length is not None and length > context:
        raise ModelError(
            f"{length} tokens were asked of a {config.model_type!r} model that is exact up to {context}; "
            f"set the lengths of questions and answers to {context} tokens together, or less"
        )


def usable_context(config: PretrainedConfig) -> int:
    """The longest sequence in tokens, at which the rotary positions are still those of pretraining.

    `dynamic` and `longrope` positions change with the longest sequence in a batch, so packed would not equal separate
    beyond the original length; `yarn` is held to the same bound.
    """
    context = int(config.max_position_embeddings)
    for rope in _ropes(config):
        if rope.get("rope_type") in _LENGTH_BOUND_ROPE:
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            context = min(context, int(original or context))
    return context


def _reason(config: PretrainedConfig) -> str | None:
    """Why the model is refused, or None."""
    if config.model_type in _REFUSED_FAMILIES:
        return f"they have {_REFUSED_FAMILIES[config.model_type]}"
    if getattr(config, "is_encoder_decoder", False):
        return "they are encoder-decoders"
    # `sub_configs` tells a composite; asking for its text part raises where there are several.
    if any(name in config.sub_configs for name in ("text_config", "vision_config", "audio_config")):
        return "they are wrapped for images or sound beside text (take the text-only model of the family)"
    if getattr(config, "alibi", False):
        return "they have ALiBi positions"
    layers = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if layers:
        return "they have " + " and ".join(_LAYER_WORDS.get(kind, f"{kind!r} layers") for kind in sorted(layers))
    if getattr(config, "attention_chunk_size", None):
        return f"they have {_LAYER_WORDS['chunked_attention']}"
    if getattr(config, "use_bidirectional_attention", False):
        return "this one attends in both directions"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "they are not causal language models"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "_is_stateful", False):
        return f"they have {_LAYER_WORDS['linear_attention']}"
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"{model_class.__name__} does not support transformers' attention interface"
    if not list(_ropes(config)):
        return "they have no rotary positions"
    return None


def _ropes(config: PretrainedConfig) -> Iterator[Mapping[str, Any]]:
    """The rope settings: one set, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope or "rope_theta" in rope:
        yield rope
    else:
        yield from (part for part in rope.values() if isinstance(part, Mapping))
