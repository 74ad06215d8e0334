"""A role on disk: its own tensors as safetensors, and a JSON page that says what they are.

The trunk is saved apart (`folder.py`). A role's folder fits exactly one trunk, whose fingerprint it names.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stackllama.errors import ModelError
from stackllama.files import atomic_folder
from stackllama.model.roles import LoRA, Trunk

WEIGHTS, PAGE = "role.safetensors", "role.json"


def save_role(folder: Path, trunk: Trunk, role: str, *, head: str | None, trunk_hash: str) -> None:
    """Write a role's adapter or copy, and its head, atomically. head: the name of its scalar head, or None."""
    lora = trunk.adapters.get(role)
    page = {
        "role": role,
        "lora": None if lora is None else dataclasses.asdict(lora),
        "head": head,
        "trunk": trunk_hash,
    }
    with atomic_folder(folder) as unfinished:
        tensors = {name: tensor.contiguous() for name, tensor in trunk.state(role).items()}
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
        (unfinished / PAGE).write_text(json.dumps(page, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_role(folder: Path, trunk: Trunk, role: str, *, trunk_hash: str) -> None:
    """Add a saved role to a trunk under a name of the caller's choice (the judge is a reward role, for instance).

    Raises:
        ModelError: when the folder is incomplete or damaged, or was made for another trunk.
    """
    page = _page(folder)
    if page["trunk"] != trunk_hash:
        raise ModelError(
            f"{folder} stands on another SFT model (hash {page['trunk'][:12]}) than this run's ({trunk_hash[:12]}); "
            "train the stage again: delete its folder and run the same command"
        )
    if page["lora"] is None:
        trunk.add_copy(role)
    else:
        trunk.add_adapter(role, LoRA(**{**page["lora"], "targets": tuple(page["lora"]["targets"])}), seed=0)
    if page["head"] is not None:
        trunk.add_head(role, page["head"], spread=0.0, seed=0)
    try:
        trunk.load_state(role, load_file(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read ({error}); train the stage again") from error


def _page(folder: Path) -> dict[str, Any]:
    try:
        page = json.loads((folder / PAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / PAGE} cannot be read ({error}); train the stage again") from error
    if not isinstance(page, dict) or set(page) != {"role", "lora", "head", "trunk"}:
        raise ModelError(f"{folder / PAGE} is no page of a role; train the stage again")
    return page
