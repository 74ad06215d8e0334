from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stackllama.errors import CheckpointError
from stackllama.train import checkpoint
from stackllama.train.checkpoint import load_latest, rng_state, save, set_rng_state


def state(seed: int = 0) -> dict[str, Any]:
    shared = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return {
        "model": {
            "embed.weight": shared,
            "head.weight": shared,  # tied
            "turned": shared.T,  # the same memory, not contiguous
            "half": shared.bfloat16(),
            "scalar": torch.tensor(7.0),
            "nothing": torch.zeros(0, 3),
        },
        "kl": {"coefficient": 0.1 + 0.2, "target": 6.0},
        "source": {
            "position": 123,
            "order": [5, 3, 1],
            "name": "été",
            "done": False,
            "rest": None,
            "empty": {},
            "none": [],
        },
        "rollouts": [{"ids": torch.tensor([1, 2]), "text": "a"}, {"ids": torch.tensor([3]), "text": "b"}],
        "best": [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308],
        "seed": 2**127,
        "rng": rng_state(),
    }


def assert_same(left: Any, right: Any, key: str = "state") -> None:
    assert type(left) is type(right), key
    if isinstance(left, dict):
        assert list(left) == list(right), key
        for name in left:
            assert_same(left[name], right[name], f"{key}.{name}")
    elif isinstance(left, list):
        assert len(left) == len(right), key
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{key}.{index}")
    elif isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), key
        assert torch.equal(left, right), key
    elif isinstance(left, float):
        assert left.hex() == right.hex(), key  # every bit, the sign of -0.0 too
    else:
        assert left == right, key


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of a checkpoint."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def sign_again(folder: Path) -> None:
    """Bring the manifest's sizes and hashes in line, so that only the lists of keys can tell."""

    def change(manifest: dict[str, Any]) -> None:
        for name in manifest["files"]:
            content = (folder / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    rewrite(folder / "manifest.json", change)


def test_every_kind_of_value_comes_back_as_it_was(tmp_path: Path) -> None:
    assert save(tmp_path, 123, state()) == tmp_path / "step-00000123"
    found = load_latest(tmp_path)
    assert found is not None
    assert found[0] == 123
    assert_same(found[1], state())


def test_loaded_tensors_are_aligned_and_tied_ones_come_apart(tmp_path: Path) -> None:
    save(tmp_path, 1, state())
    found = load_latest(tmp_path)
    assert found is not None
    model = found[1]["model"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.values())
    model["embed.weight"].zero_()
    assert model["head.weight"].any()


def test_nothing_there(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "missing") is None
    assert load_latest(tmp_path) is None


def test_nothing_is_pickled_and_the_json_is_strict(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, state())
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((folder / "state.json").read_text(), parse_constant=refuse)  # NaN and Infinity are no JSON


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 9, 100, 100_000_000):
        save(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-100000000"]
    found = load_latest(tmp_path)
    assert found == (100_000_000, {"step": 100_000_000})


def test_the_same_step_can_be_written_again_but_none_before_it(tmp_path: Path) -> None:
    save(tmp_path, 4, {"x": 1})
    save(tmp_path, 4, {"x": 2})
    assert load_latest(tmp_path) == (4, {"x": 2})
    with pytest.raises(CheckpointError, match="the later step 4"):
        save(tmp_path, 3, {"x": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def remove_slowly(folder: Path) -> None:
    """Stands for shutil.rmtree: one file after the other, so that a kill can come between two."""
    for path in sorted(folder.iterdir()):
        path.unlink()
    folder.rmdir()


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls_left = 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            nonlocal calls_left
            calls_left -= 1
            if calls_left < 0:
                raise Killed
            return function(*args, **named)

        return wrapped

    steps_found = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        for step in (1, 2):
            save(folder, step, state(step))
        with monkeypatch.context() as patch:
            calls_left = moment
            for owner, name in (
                (checkpoint, "save_file"),
                (os, "fsync"),
                (Path, "rename"),
                (Path, "write_text"),
                (Path, "mkdir"),
            ):
                patch.setattr(owner, name, killing(getattr(owner, name)))
            patch.setattr(shutil, "rmtree", remove_slowly)
            patch.setattr(Path, "unlink", killing(Path.unlink))
            try:
                save(folder, 3, state(3))
            except Killed:
                finished = False
            else:
                finished = True
        found = load_latest(folder)
        assert found is not None
        for step in range(found[0], 0, -1):  # the newest and every older one that is still there
            older = load_latest(folder)
            if older is None:
                break
            assert older[0] == step
            assert_same(older[1], state(step))
            shutil.rmtree(folder / f"step-{step:08d}")
        assert not list(folder.glob(f"{checkpoint.UNFINISHED}*"))
        steps_found.append(found[0])
        if finished:
            break
    assert finished
    assert steps_found == sorted(steps_found)
    assert steps_found[0] == 2
    assert steps_found.count(2) >= 8  # mkdir, three files, four flushes
    assert steps_found.count(3) >= 3  # and after the rename


def test_a_killed_save_is_cleaned_by_the_next_one_too(tmp_path: Path) -> None:
    for step in (7, 8):  # of an earlier step, and of the very step that is written again
        left = tmp_path / f"{checkpoint.UNFINISHED}{step:08d}"
        left.mkdir()
        (left / "state.json").write_text("{")
    save(tmp_path, 8, {"x": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1, {"x": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .* Free some space"):
            save(tmp_path, 2, {"x": torch.zeros(10_000)})
        with pytest.raises(CheckpointError, match=r"step 2 could not be written .* Free some space"):
            save(tmp_path, 2, {"x": list(range(10_000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_latest(tmp_path) == (1, {"x": 1})


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every entry below the dicts of a state."""
    if isinstance(value, dict) and value:
        return [leaf for name, item in value.items() for leaf in leaves(item, (*path, name))]
    return [path]


@pytest.mark.parametrize("signed", [False, True])
def test_each_key_dropped_from_the_state_is_missed(tmp_path: Path, *, signed: bool) -> None:
    for path in leaves(state()):

        def drop(content: dict[str, Any], path: tuple[str, ...] = path) -> None:
            for name in path[:-1]:
                content = content[name]
            del content[path[-1]]

        folder = save(tmp_path, 1, state())
        rewrite(folder / "state.json", drop)
        if signed:
            sign_again(folder)
        with pytest.raises(CheckpointError, match=".".join(path).replace(".", r"\.")):
            load_latest(tmp_path)


@pytest.mark.parametrize("signed", [False, True])
def test_each_tensor_dropped_is_missed(tmp_path: Path, *, signed: bool) -> None:
    folder = save(tmp_path, 1, state())
    for key in load_file(folder / "tensors.safetensors"):
        save(tmp_path, 1, state())
        tensors = load_file(folder / "tensors.safetensors")
        del tensors[key]
        save_file(tensors, folder / "tensors.safetensors")
        if signed:
            sign_again(folder)
        with pytest.raises(CheckpointError, match=rf"tensors.safetensors lacks {key}"):
            load_latest(tmp_path)


@pytest.mark.parametrize("key", ["format", "step", "keys", "files"])
def test_each_key_dropped_from_the_manifest_is_missed(tmp_path: Path, key: str) -> None:
    folder = save(tmp_path, 1, state())
    rewrite(folder / "manifest.json", lambda manifest: manifest.pop(key))
    with pytest.raises(CheckpointError, match=rf"manifest\.json lacks .*{key}"):
        load_latest(tmp_path)


@pytest.mark.parametrize("damaged", [None, 3, "y", {"x": 1}, [3], [["x"]], [{}, "x"]])
def test_other_values_than_names_are_refused(tmp_path: Path, damaged: Any) -> None:
    folder = save(tmp_path, 1, {"x": torch.zeros(1)})
    rewrite(folder / "state.json", lambda content: content.update(x={"$tensor": damaged}))
    with pytest.raises(CheckpointError, match=r"step-00000001 is damaged: (the tensors of|\S+ lacks|\S+ has)"):
        load_latest(tmp_path)
    save(tmp_path, 1, {"x": torch.zeros(1)})
    rewrite(folder / "manifest.json", lambda manifest: manifest.update(keys=damaged))
    with pytest.raises(CheckpointError, match=r"step-00000001 is damaged: keys in manifest.json are not a list"):
        load_latest(tmp_path)


@pytest.mark.parametrize("damaged", [None, [], "state.json", {"state.json": []}])
def test_other_values_than_files_are_refused(tmp_path: Path, damaged: Any) -> None:
    folder = save(tmp_path, 1, {"x": 1})
    rewrite(folder / "manifest.json", lambda manifest: manifest.update(files=damaged))
    with pytest.raises(CheckpointError, match=r"step-00000001 is damaged: .*Delete that folder"):
        load_latest(tmp_path)


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, state())
    rewrite(folder / "state.json", lambda content: content.update(stray=1))
    sign_again(folder)
    with pytest.raises(CheckpointError, match="unknown stray"):
        load_latest(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_damage_is_an_error_that_names_the_folder_to_delete(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1, state(1))
    folder = save(tmp_path, 2, state(2))
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        # The flipped byte is the last but three: inside a tensor, a value, or a hash.
        flipped = content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]
        (folder / name).write_bytes({"empty": b"", "cut": content[: len(content) // 2], "flipped": flipped}[damage])
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged: .*Delete that folder .* from step 1$"):
        load_latest(tmp_path)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()  # as told
    found = load_latest(tmp_path)
    assert found is not None
    assert found[0] == 1
    assert_same(found[1], state(1))


def test_a_checkpoint_of_another_step_or_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, {"x": 1})
    folder.rename(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="step 1; needed are 1, 2"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": (1, 2)}, "holds tuple at a"),
        ({"a": {"b": [{"c": {1, 2}}]}}, r"holds set at a\.b\.0\.c"),
        ({"a": torch.float32}, "holds dtype at a"),
        ({"a": {3: 1}}, "key 3 under a"),
        ({"$tensor": "x"}, r"key '\$tensor'"),
        ({"a": {"b.c": 1}, "a.b": {"c": 2}}, r"dotted key a\.b\.c"),
    ],
)
def test_what_cannot_come_back_exactly_is_refused(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, bad)
    assert list(tmp_path.iterdir()) == []


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.randn(5)
    save(tmp_path, 1, {"rng": rng_state()})
    expected = torch.randn(100)
    found = load_latest(tmp_path)
    assert found is not None
    assert set_rng_state(found[1]["rng"]) is None
    assert torch.equal(torch.randn(100), expected)


def test_another_number_of_gpus_is_told() -> None:
    saved = rng_state()
    devices = len(saved["cuda"])
    notice = set_rng_state(saved | {"cuda": [*saved["cuda"], torch.zeros(16, dtype=torch.uint8)]})
    assert notice is not None
    assert f"{devices + 1} GPUs, this machine has {devices}" in notice
    with pytest.raises(CheckpointError, match="needed are cpu and cuda"):
        set_rng_state({"cpu": saved["cpu"]})
