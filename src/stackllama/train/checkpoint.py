"""Checkpoints: the whole state of a stage, written so that a kill at any moment leaves a whole one behind.

    FOLDER/step-00000123/state.json            the nested state; a tensor stands there as {"$tensor": its dotted key}
                         tensors.safetensors   the tensors by dotted key
                         manifest.json         step, every key of the state, size and sha256 of the two files

Decision: a damaged newest checkpoint is an error that says which folder to delete. Falling back to the one before by
itself would hide a failing disk, and the user would not learn why hours of work were done twice. Left out on purpose:
pickle (nothing is ever unpickled), sharded writing, writing in the background.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stackllama.errors import CheckpointError

FORMAT = 1
KEPT = 2  # checkpoints; the older one is there for the moment in which a damaged newest one has to be deleted
STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
UNFINISHED = ".unfinished-"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` (updates made so far), keep the newest two, and give its folder.

    state: nested dicts with string keys (dots allowed), lists, tensors of any shape, dtype and device, and plain bool,
    int, float (also NaN and infinite), str and None. Tensors that share memory are written each in full and come back
    apart. Atomic: written to a folder beside it, flushed to disk, then renamed. Raises CheckpointError, and leaves the
    earlier checkpoints as they were, for a state that holds anything else, a later step already there, or a disk that
    refuses.
    """
    tensors: dict[str, Tensor] = {}
    encoded = _encode(dict(state), "", tensors)
    keys = list(_keys(encoded, ""))
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CheckpointError(f"two entries of the state have the dotted key {twice}: rename one of them")
    later = [other for other in _steps(folder) if other > step]
    if later:
        raise CheckpointError(f"{folder} holds the later step {later[-1]}: delete it, or use another folder")
    final, unfinished = _step_folder(folder, step), folder / f"{UNFINISHED}{step:08d}"
    try:
        _clean(folder)
        unfinished.mkdir(parents=True)
        (unfinished / STATE).write_text(json.dumps(encoded, allow_nan=False), encoding="utf-8")
        save_file(_independent(tensors), unfinished / TENSORS)
        files = {name: _fingerprint(unfinished / name) for name in (STATE, TENSORS)}
        manifest = {"format": FORMAT, "step": step, "keys": keys, "files": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for name in (STATE, TENSORS, MANIFEST, "."):
            _flush(unfinished / name)
        if final.exists():  # the same step again: a kill between these two lines costs this step, not the one before
            final.rename(folder / f"{UNFINISHED}replaced")
        unfinished.rename(final)
        _flush(folder)
        for old in _steps(folder)[:-KEPT]:  # renamed first: a kill in the middle must not leave a half that looks whole
            _step_folder(folder, old).rename(folder / f"{UNFINISHED}{old:08d}-old")
        _clean(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder}: {error}. Free some space or choose "
            "another folder; the checkpoints already there are untouched"
        ) from error
    return final


def load_latest(folder: Path, *, before: int | None = None) -> tuple[int, dict[str, Any]] | None:
    """Give (step, state) of the newest checkpoint, all tensors on the CPU, or None if there is none.

    before: take one of an earlier step than this. Removes what a killed `save` left behind. Raises CheckpointError,
    naming the missing or unknown keys and the folder to delete, if that checkpoint is not exactly what was written.
    """
    if not folder.is_dir():
        return None
    _clean(folder)
    steps = [step for step in _steps(folder) if before is None or step < before]
    if not steps:
        return None
    path = _step_folder(folder, steps[-1])
    try:
        return steps[-1], _read(path, steps[-1])
    except _DamagedError as damaged:
        back = f"go on from step {steps[-2]}" if len(steps) > 1 else "start this stage from its beginning"
        raise CheckpointError(
            f"{path} is damaged: {damaged}. Delete that folder and give the command again, to {back}"
        ) from damaged
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Look at the disk and its permissions") from error


def rng_state() -> dict[str, Any]:
    """Give the states of torch's generators: the CPU's, and one for each GPU.

    Python's `random` and numpy's global generator are left out: nothing in this package draws from them.
    """
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: Mapping[str, Any]) -> str | None:
    """Go on from `rng_state`; give a sentence to show if the number of GPUs differs, and so the bits will.

    Raises CheckpointError for missing or unknown keys.
    """
    if set(state) != {"cpu", "cuda"}:
        raise CheckpointError(
            f"the state of the random generators has the keys {sorted(state)}, needed are cpu and cuda"
        )
    torch.set_rng_state(state["cpu"])
    saved, present = len(state["cuda"]), torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in range(min(saved, present)):
        torch.cuda.set_rng_state(state["cuda"][device], device)
    if saved == present:
        return None
    return (
        f"the checkpoint was made with {saved} GPUs, this machine has {present}: the run goes on, but bits will differ"
    )


class _DamagedError(Exception):
    """What is wrong with a checkpoint on disk, in words."""


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a state into strict JSON and collect its tensors by dotted key."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"$tensor": key}
    if isinstance(value, Mapping):
        for name in value:
            if type(name) is not str or not name or name.startswith("$"):
                raise CheckpointError(
                    f"the state has the key {name!r} under {key or 'its top'}: use a name without leading $"
                )
        return {name: _encode(item, _join(key, name), tensors) for name, item in value.items()}
    if type(value) is list:
        return [_encode(item, _join(key, str(index)), tensors) for index, item in enumerate(value)]
    if type(value) is float and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise CheckpointError(
        f"the state holds {type(value).__name__} at {key}: allowed are dict, list, Tensor, bool, int, float, str, None"
    )


def _decode(encoded: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(encoded, list):
        return [_decode(item, tensors) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if "$tensor" in encoded:
        return tensors[encoded["$tensor"]]
    if "$float" in encoded:
        return float(encoded["$float"])
    return {name: _decode(item, tensors) for name, item in encoded.items()}


def _keys(encoded: Any, key: str) -> Iterator[str]:
    """Give the dotted key of each leaf; a list of plain values is one leaf, or token ids would fill the manifest."""
    if isinstance(encoded, dict) and encoded and not next(iter(encoded)).startswith("$"):
        for name, item in encoded.items():
            yield from _keys(item, _join(key, name))
    elif isinstance(encoded, list) and any(isinstance(item, dict | list) for item in encoded):
        for index, item in enumerate(encoded):
            yield from _keys(item, _join(key, str(index)))
    else:
        yield key


def _read(path: Path, step: int) -> dict[str, Any]:
    manifest = _json(path / MANIFEST)
    if not isinstance(manifest, dict) or set(manifest) != {"format", "step", "keys", "files"}:
        raise _DamagedError(f"{MANIFEST} lacks one of format, step, keys, files")
    if not isinstance(manifest["files"], dict):
        raise _DamagedError(f"files in {MANIFEST} is a {type(manifest['files']).__name__}, not a dict")
    if manifest["format"] != FORMAT or manifest["step"] != step:
        raise _DamagedError(
            f"{MANIFEST} says format {manifest['format']}, step {manifest['step']}; needed are {FORMAT}, {step}"
        )
    encoded = _json(path / STATE)
    try:
        with safe_open(path / TENSORS, framework="pt") as file:
            expected, tensor_keys = manifest["keys"], list(_tensor_keys(encoded))
            _refuse_other_than_names(f"keys in {MANIFEST}", expected)
            _compare("the manifest's keys", expected, STATE, list(_keys(encoded, "")))
            _refuse_other_than_names(f"the tensors of {STATE}", tensor_keys)
            _compare(f"the tensors of {STATE}", tensor_keys, TENSORS, list(file.keys()))
            for name in (STATE, TENSORS):  # keys first: "which key" tells more than "another sha256"
                if manifest["files"].get(name) != _fingerprint(path / name):
                    raise _DamagedError(f"{name} is not as it was written (its size or sha256 differs)")
            # Cloned: mapped tensors lie at any address, and the bits of a sum can depend on how its input is aligned.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, FileNotFoundError) as error:
        raise _DamagedError(f"{TENSORS} cannot be read ({error})") from error
    state = _decode(encoded, tensors)
    assert isinstance(state, dict)
    return state


def _tensor_keys(encoded: Any) -> Iterator[Any]:
    if isinstance(encoded, dict) and "$tensor" in encoded:
        yield encoded["$tensor"]
    elif isinstance(encoded, dict | list):
        for item in encoded.values() if isinstance(encoded, dict) else encoded:
            yield from _tensor_keys(item)


def _refuse_other_than_names(what: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _DamagedError(f"{what} are not a list of names")


def _compare(source: str, expected: list[str], name: str, found: list[str]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for word, keys in (("lacks", missing), ("has the unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise _DamagedError(f"{name} {word} {', '.join(keys[:4])}{more} (compared with {source})")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _DamagedError(f"{path.name} is missing") from error
    except ValueError as error:  # both JSON and UTF-8 errors
        raise _DamagedError(f"{path.name} cannot be read ({error})") from error


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, contiguous; copy those that share memory."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        apart[key] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return apart


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name)))


def _clean(folder: Path) -> None:
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)
