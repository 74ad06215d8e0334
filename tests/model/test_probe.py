"""The probe passes every supported kind of model and catches what would be silently wrong."""

from __future__ import annotations

import pytest
import torch
from transformers import CohereConfig

from stackllama.errors import ModelError
from stackllama.model.probe import probe
from tests.model.tiny import CONFIGS, tiny_model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supported_models_pass(kind: str, dtype: torch.dtype) -> None:
    probe(tiny_model(kind).to(dtype))


def test_a_model_that_scales_its_logits_is_caught() -> None:
    from transformers import AutoModelForCausalLM

    config = CohereConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, logit_scale=0.1
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="forest")
    for parameter in model.parameters():
        parameter.data.mul_(5.0)
    with pytest.raises(ModelError, match="CohereForCausalLM does not give packed sequences"):
        probe(model)


def test_a_model_whose_attention_ignores_the_forest_is_caught() -> None:
    model = tiny_model("qwen3")
    model.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="Qwen3ForCausalLM does not give packed sequences"):
        probe(model)
