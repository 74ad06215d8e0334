from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    T5Config,
)

from stackllama.errors import ModelError
from stackllama.model.support import check_supported, usable_context

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY),
        LlamaConfig(**TINY, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        MistralConfig(**TINY, sliding_window=8),
        Qwen3Config(**TINY, head_dim=16),
        Gemma2Config(**TINY, head_dim=16, attn_logit_softcapping=50.0, sliding_window=8),
        Gemma3TextConfig(**TINY, head_dim=16, sliding_window=8),
        MixtralConfig(**TINY, num_local_experts=2),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_rotary_softmax_decoders_are_accepted(config: PretrainedConfig) -> None:
    check_supported(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(hidden_size=32, n_layer=2, n_head=2), "'bloom'.*ALiBi"),
        (MptConfig(d_model=32, n_layers=2, n_heads=2), "'mpt'.*ALiBi"),
        (FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=True), "'falcon'.*ALiBi"),
        (FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2), "'falcon'.*attention interface"),
        (Llama4TextConfig(**TINY), "'llama4_text'.*chunked attention"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2), "'mamba'.*recurrent"),
        (Qwen3NextConfig(**TINY), "'qwen3_next'.*linear or recurrent"),
        (RecurrentGemmaConfig(num_hidden_layers=3), "'recurrent_gemma'.*linear or recurrent"),
        (Lfm2Config(**TINY), "'lfm2'.*convolutions"),
        (T5Config(d_model=32, num_layers=2), "'t5'.*encoder-decoder"),
        (Gemma3Config(), "'gemma3'.*images or sound"),
        (Gemma3TextConfig(**TINY, use_bidirectional_attention=True), "'gemma3_text'.*both directions"),
        (BertConfig(hidden_size=32, num_attention_heads=2), "'bert'.*no rotary"),
        (GPT2Config(n_embd=32, n_head=2), "'gpt2'.*no rotary"),
        (
            LlamaConfig(**TINY, layer_types=["full_attention"] * 3 + ["indexed_attention"]),
            "'llama'.*'indexed_attention' layers",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_other_models_are_refused_by_name_and_reason(config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_supported(config)


def test_the_context_is_the_models_length() -> None:
    assert usable_context(LlamaConfig(**TINY, max_position_embeddings=256)) == 256


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (Phi3Config(**TINY, max_position_embeddings=4096, original_max_position_embeddings=512,
                    rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8}), 512),
        (LlamaConfig(**TINY, max_position_embeddings=256,
                     rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}), 256),
        (GptOssConfig(**TINY, head_dim=16, max_position_embeddings=1024,
                      rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0,
                      "original_max_position_embeddings": 128}), 128),
    ],
    ids=["longrope", "dynamic", "yarn"],
)  # fmt: skip
def test_stretched_positions_are_used_up_to_their_original_length(config: PretrainedConfig, context: int) -> None:
    assert usable_context(config) == context
    check_supported(config, length=context)
    with pytest.raises(ModelError, match=f"{context + 1} tokens.*exact up to {context}"):
        check_supported(config, length=context + 1)
