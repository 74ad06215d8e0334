"""GGUF files of a tiny Llama, written here with the gguf package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stackllama.errors import ModelError
from stackllama.model.load import load_base
from stackllama.tokens.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("accelerate", reason="the package accelerate is not installed")

WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN = 32, 2, 4, 2, 64
BYTE_LEVEL = Tokenizer.train(["the yeast, 42 of them, and the hops"] * 5, 280)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BYTE_LEVEL.vocab_size,
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=77,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    ).eval()


def _tensors(model: PreTrainedModel) -> dict[str, np.ndarray[Any, Any]]:
    """The weights under llama.cpp's names; it keeps the two halves of a rotated pair side by side."""
    out = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if ".layers." in name:
            layer, inner = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = HEADS if "q_proj" in inner else KV_HEADS
                value = value.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(value.shape)
            out[f"blk.{layer}.{NAMES[inner]}.weight"] = value
        else:
            out[{"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]] = (
                value
            )
    return out


def _write(path: Path, tensors: dict[str, np.ndarray[Any, Any]], pre: str = "smollm", eos: bool = True) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(77)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(BYTE_LEVEL.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    vocabulary = sorted(BYTE_LEVEL.rust.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if number in BYTE_LEVEL.control_ids else 1 for _, number in vocabulary])
    merges = json.loads(BYTE_LEVEL.rust.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    if eos:
        writer.add_eos_token_id(BYTE_LEVEL.eos_id)
    writer.add_bos_token_id(2)
    writer.add_add_bos_token(False)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_weights_and_the_corrected_tokenizer(tmp_path: Path) -> None:
    model = _model()
    path = _write(tmp_path / "tiny.gguf", _tensors(model))
    (tmp_path / "config.json").write_text("{")  # a neighbour that must not be read
    (tmp_path / "tokenizer_config.json").write_text("{")
    base = load_base(str(path))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(base.model(ids).logits, model(ids).logits, atol=1e-6)
    assert (base.context, base.tokenizer.bos_id, base.tokenizer.eos_id) == (77, None, BYTE_LEVEL.eos_id)
    assert not hasattr(base.model.config, "quantization_config")
    for text in ("x =  42", "the yeast", "don't 1000", "see <|endoftext|>", "你好"):
        assert base.tokenizer.encode(text) == BYTE_LEVEL.encode(text)
        assert base.tokenizer.control_ids.isdisjoint(base.tokenizer.encode(text))


@pytest.mark.parametrize("dropped", ["blk.1.ffn_up.weight", "output_norm.weight", "blk.0.attn_norm.weight"])
def test_a_missing_tensor_is_missed(tmp_path: Path, dropped: str) -> None:
    tensors = _tensors(_model())
    del tensors[dropped]
    with pytest.raises(ModelError, match="no fitting tensor for model"):
        load_base(str(_write(tmp_path / "tiny.gguf", tensors)))


def test_a_tensor_that_would_be_skipped_is_refused(tmp_path: Path) -> None:
    tensors = {**_tensors(_model()), "blk.0.attn_extra.weight": np.ones(4, dtype=np.float32)}
    with pytest.raises(ModelError, match="21 tensors where the model has 20 parameters"):
        load_base(str(_write(tmp_path / "tiny.gguf", tensors)))


def test_scaled_positions_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    tensors = {**_tensors(_model()), "rope_freqs.weight": np.ones(4, dtype=np.float32)}
    with pytest.raises(ModelError, match="scales its positions"):
        load_base(str(_write(tmp_path / "tiny.gguf", tensors)))


def test_an_unknown_way_of_cutting_text_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "tiny.gguf", _tensors(_model()), pre="somebody-elses")
    with pytest.raises(ModelError, match="'somebody-elses', which cannot be rebuilt"):
        load_base(str(path))


def test_a_file_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="names no EOS token"):
        load_base(str(_write(tmp_path / "tiny.gguf", _tensors(_model()), eos=False)))


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.3, 0.9])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    path = _write(tmp_path / "tiny.gguf", _tensors(_model()))
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ModelError, match=r"cannot read .*tiny\.gguf"):
        load_base(str(path))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    path.touch()
    monkeypatch.setattr("stackllama.model.gguf_file.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install accelerate gguf"):
        load_base(str(path))
