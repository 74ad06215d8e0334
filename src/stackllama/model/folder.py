"""Model folders: safetensors and JSON, nothing else; read with every file checked, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from stackllama.errors import ModelError
from stackllama.files import atomic_folder
from stackllama.model.support import check_supported, usable_context
from stackllama.tokens.tokenizer import Tokenizer

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


@dataclass(frozen=True, slots=True, eq=False)
class LoadedBase:
    """A model with its tokenizer; `source` says in words where it came from, `context` is its length in tokens."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    source: str
    context: int


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, *, attention: str = "eager", strict: bool = True
) -> LoadedBase:
    """Read a model folder with its weights in `dtype`; `strict` also refuses tensors that the model has no place for.

    Raises ModelError where a file is missing, broken or cut off, where weights are pickled, where the model cannot read
    forests, and where weights, configuration and tokenizer do not belong together.
    """
    check_attention(attention)
    config = read_config(folder)
    check_supported(config)
    _check_weights(folder)
    tokenizer = Tokenizer.load(folder)
    rows = int(config.vocab_size)
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"the tokenizer in {folder} has ids up to {tokenizer.vocab_size - 1}, but the model's embedding has "
            f"{rows} rows; put the tokenizer files there that the model was trained with"
        )
    try:
        with quiet():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the weights in {folder} do not fit its config.json: {error}; fetch both again") from error
    kinds = ("missing_keys", "mismatched_keys", *(("unexpected_keys",) if strict else ()))
    for kind in kinds:
        if loading[kind]:
            names = ", ".join(sorted(map(str, loading[kind]))[:5])
            raise ModelError(
                f"the weights in {folder} do not fit its config.json: {kind.removesuffix('_keys')} "
                f"{len(loading[kind])} tensors, such as {names}; fetch both again"
            )
    return LoadedBase(model.eval(), tokenizer, f"folder {folder}", usable_context(config))


def save_model(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Write safetensors, configuration and tokenizer, which transformers reads too; tied weights are written once.

    The folder appears whole or not at all; an older one there is replaced. Raises ModelError for anything but a plain
    transformers model, RunError where the disk is full.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a {type(model).__name__} cannot be saved as a base model; merge its adapter first")
    with atomic_folder(folder) as temporary, quiet():
        model.save_pretrained(temporary)
        tokenizer.save(temporary, context=usable_context(model.config))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, which would break a live display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check_attention(attention: str) -> None:
    """Raise ModelError where transformers' attention interface has no function of that name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if attention not in known:
        raise ModelError(f"no attention named {attention!r} is registered; allowed: {', '.join(sorted(known))}")


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder. Raises ModelError where there is none, or one that cannot be used."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} holds an adapter, not a model; give the model that it was trained on, or merge it"
            )
        raise ModelError(f"{folder} has no config.json, so it is no model folder; give the folder that has one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}; fetch it again") from error
    if not isinstance(data, dict) or "model_type" not in data:
        raise ModelError(f'{path} has no "model_type", so it is not a model\'s configuration; fetch it again')
    if "quantization_config" in data:
        raise ModelError(f"{folder} holds quantized weights, which cannot be trained; give the original weights")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # unknown types, values of the wrong kind, code that would have to be run
        raise ModelError(
            f"transformers cannot read {path} (model_type {data['model_type']!r}): {error}; "
            "models that bring their own code are not run here"
        ) from error


def _check_weights(folder: Path) -> None:
    """The weights are there, as safetensors, and none of their files is cut off."""
    files = [folder / _WEIGHTS]
    if not files[0].is_file():
        if not (folder / _INDEX).is_file():
            pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
            if pickled:
                raise ModelError(
                    f"{folder} has its weights in {pickled[0]}, a pickle, which can run code and is never read here; "
                    f"give a folder with {_WEIGHTS}"
                )
            raise ModelError(f"{folder} has no {_WEIGHTS}; give a folder with the weights")
        try:
            names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{folder / _INDEX} is not a list of weight files: {error!r}; fetch it again") from error
        files = [folder / name for name in sorted(names)]
    for path in files:
        # A name in the index must not lead outside the folder, nor to another kind of file.
        if path.parent != folder or path.suffix != ".safetensors" or not path.is_file():
            raise ModelError(
                f"{folder / _INDEX} names {path.name}, which is not a safetensors file there; fetch it again"
            )
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is broken or cut off: {error}; fetch it again") from error
