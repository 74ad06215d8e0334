"""Reading a GGUF file: dense weights and the tokenizer it describes.

transformers unpacks the weights. Three things it gets wrong are put right here or refused: a pre-tokenizer that it
does not know is taken for GPT-2's, in silence (digits then split wrongly); tensors whose names it cannot map are
skipped, in silence; other files beside the GGUF file leak into its configuration.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stackllama.errors import ModelError
from stackllama.model.folder import quiet
from stackllama.model.support import check_supported
from stackllama.tokens.tokenizer import Tokenizer, digits_and_bytes

# Byte-level vocabularies by the name of their pre-tokenizer (llama.cpp's `tokenizer.ggml.pre`).
_GPT2_WORDS = frozenset({"default", "gpt-2", "olmo", "jais", "phi-2"})
_DIGITS_THEN_GPT2_WORDS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})


def load_gguf(path: Path, *, dtype: torch.dtype, attention: str = "eager") -> tuple[PreTrainedModel, Tokenizer]:
    """Read model and tokenizer, weights unpacked to `dtype`.

    Raises ModelError for a file that is broken or cut off, a model that cannot read forests, a tokenizer that cannot be
    rebuilt exactly, and where not every parameter came out of the file or not every tensor went into the model.
    """
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ModelError(f"reading {path.name} needs the package {package}; pip install accelerate gguf")
    # Alone in a folder, or transformers reads the neighbours' config and tokenizer files too.
    with tempfile.TemporaryDirectory() as alone, quiet():
        (Path(alone) / path.name).symlink_to(path.resolve())
        try:
            from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer, read_gguf_metadata

            metadata, tensors = read_gguf_metadata(str(path))
            model = _model(alone, path, dtype, attention)
            _check_complete(model, tensors, path)
            architecture, words, _ = get_gguf_tokenizer(str(path))
            rust, _ = convert_gguf_tokenizer(architecture, words)
            _correct_pre_tokenizer(rust, metadata, path)
            return model, _tokenizer(rust, metadata, path)
        except ModelError:
            raise
        except Exception as error:  # a file that is cut off fails in many ways, inside transformers, gguf and numpy
            raise ModelError(
                f"transformers cannot read {path}: {error!r}; fetch it again, or use the model's safetensors files"
            ) from error


def gguf_config(path: Path) -> PretrainedConfig:
    """The configuration that the file describes; its weights are not read. Raises ModelError where it has none."""
    try:
        with tempfile.TemporaryDirectory() as alone, quiet():
            (Path(alone) / path.name).symlink_to(path.resolve())
            return AutoConfig.from_pretrained(alone, gguf_file=path.name)
    except Exception as error:
        raise ModelError(f"transformers cannot read {path}: {error!r}; fetch it again") from error


def _model(folder: str, path: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    from transformers.utils.quantization_config import GgufConfig

    config = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    check_supported(config)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:
        names = sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))
        raise ModelError(
            f"{path} has no fitting tensor for {', '.join(names[:5])} ({len(names)} in all); fetch it again"
        )
    # Dense now: a saved copy must not claim to be quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def _check_complete(model: PreTrainedModel, tensors: Sequence[str], path: Path) -> None:
    """Every tensor of the file went somewhere: experts apart, one tensor is one parameter."""
    if "rope_freqs.weight" in tensors:
        raise ModelError(
            f"{path} scales its positions by a tensor that would be lost; use the model's safetensors files"
        )
    experts = [name for name in tensors if "_exps." in name]
    parameters = len(list(model.parameters()))  # tied ones once, as in the file
    if not experts and len(tensors) != parameters:
        raise ModelError(
            f"{path} has {len(tensors)} tensors where the model has {parameters} parameters, so some would be lost; "
            "use the model's safetensors files"
        )


def _correct_pre_tokenizer(rust: Any, metadata: dict[str, Any], path: Path) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or name in GGUF_PRE_TOKENIZER_SPLITS or name in _GPT2_WORDS:
        return
    if name not in _DIGITS_THEN_GPT2_WORDS:
        raise ModelError(
            f"{path} cuts text by the rule {name!r}, which cannot be rebuilt exactly; use the model's safetensors files"
        )
    rust.pre_tokenizer = digits_and_bytes()


def _tokenizer(rust: Any, metadata: dict[str, Any], path: Path) -> Tokenizer:
    def token(name: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if number is None else rust.id_to_token(number)

    eos = token("eos")
    if eos is None:
        raise ModelError(f"{path} names no EOS token, so answers could not end; use the model's safetensors files")
    # SentencePiece vocabularies start texts with BOS unless the file says otherwise, byte-level ones do not.
    starts = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    return Tokenizer.wrap(rust, bos=token("bos") if starts else None, eos=eos, pad=token("padding"))
