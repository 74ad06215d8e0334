"""Loading what finished stages left: only what they noted, to the byte; and what is looked at before one begins."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stackllama.assembly import (
    FINAL,
    FROZEN,
    SFT,
    Assembled,
    check_fits,
    load_roles,
    load_trunk,
    prepare_machine,
    source_hashes,
)
from stackllama.errors import DumpError, ModelError, RunError
from stackllama.files import digest_folder
from stackllama.model.folder import LoadedBase, save_model
from stackllama.model.role_folder import save_role
from stackllama.model.roles import LoRA, Trunk
from stackllama.recipe import Recipe
from stackllama.recipe_load import load_recipe
from stackllama.run import Run, open_run
from stackllama.tokens.tokenizer import Tokenizer
from tests.assembled import assembled_run
from tests.data.dumps import question, site
from tests.model.tiny import tiny_model

ADAPTER = LoRA(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",))
VOCABULARY = 266


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {"name": "x", "folder": str(tmp_path), "data": {"source": "embedded"}, "compute": {"dtype": "float32"}}
    )


def finish(run: Run, stage: str, *parts: str) -> None:
    run.begin(stage)
    (run.stage(stage) / "work").touch()
    run.finish(stage, outputs={part: digest_folder(run.stage(stage) / part) for part in parts})


def make_sft(run: Run) -> None:
    """An SFT stage that kept its adapter live."""
    finish(run, "data")
    model = tiny_model()
    model.resize_token_embeddings(VOCABULARY)
    save_model(run.stage(SFT) / FINAL, model, Tokenizer.train(["the yeast and the hops"] * 5, VOCABULARY))
    trunk = Trunk(model, precision=torch.float32)
    trunk.add_adapter(SFT, ADAPTER, seed=0)
    save_role(run.stage(SFT) / FROZEN, trunk, SFT, head=None, trunk_hash="")
    finish(run, SFT, FINAL, FROZEN)


def make_reward(run: Run, assembled: Assembled) -> None:
    assembled.trunk.add_adapter("reward", ADAPTER, seed=1)
    save_role(run.stage("reward") / FINAL, assembled.trunk, "reward", head=None, trunk_hash=assembled.trunk_hash)
    assembled.trunk.drop("reward")
    finish(run, "reward", FINAL)


def flip(path: Path) -> None:
    """Change the last byte, which lies in a tensor: the file can be read as before."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_what_the_stages_left_is_loaded(recipe: Recipe) -> None:
    with open_run(recipe) as run:
        make_sft(run)
        assembled = load_trunk(recipe, run.folder)
        assert assembled.trunk.frozen == (SFT,)
        make_reward(run, assembled)
        load_roles(assembled, run.folder, "reward")
        assert "reward" in assembled.trunk.adapters


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        (FINAL, lambda folder: flip(folder / "model.safetensors")),
        (FINAL, lambda folder: (folder / "config.json").write_text("{}")),
        (FINAL, shutil.rmtree),
        (FROZEN, lambda folder: flip(folder / "role.safetensors")),
        (FROZEN, shutil.rmtree),
    ],
)
def test_another_sft_model_than_the_stage_left_is_refused(
    recipe: Recipe, part: str, damage: Callable[[Path], object]
) -> None:
    with open_run(recipe) as run:
        make_sft(run)
        damage(run.stage(SFT) / part)
        with pytest.raises(
            ModelError, match=rf"sft/{part} is not what the stage left there .*delete \S+/x/sft and run sft again$"
        ):
            load_trunk(recipe, run.folder)


def test_an_adapter_that_the_stage_did_not_note_is_refused(recipe: Recipe) -> None:
    with open_run(recipe) as run:
        make_sft(run)
        finish(run, SFT, FINAL)  # as if the adapter were left from an attempt before
        with pytest.raises(ModelError, match=r"sft/frozen is not what .*noted none"):
            load_trunk(recipe, run.folder)


def test_another_role_than_the_stage_left_is_refused(recipe: Recipe) -> None:
    with open_run(recipe) as run:
        make_sft(run)
        assembled = load_trunk(recipe, run.folder)
        make_reward(run, assembled)
        flip(run.stage("reward") / FINAL / "role.safetensors")
        with pytest.raises(ModelError, match=r"reward/final is not what the stage left there .*run reward again$"):
            load_roles(assembled, run.folder, "reward")


def test_a_stage_that_has_not_ended_says_what_to_type(recipe: Recipe) -> None:
    with open_run(recipe) as run:
        with pytest.raises(RunError, match=r"sft has not been run in \S+; first type: stackllama sft \S+/recipe.yaml"):
            load_trunk(recipe, run.folder)
        make_sft(run)
        with pytest.raises(RunError, match=r"ppo has not been run in \S+; first type: stackllama ppo"):
            load_roles(load_trunk(recipe, run.folder), run.folder, "policy")


def test_a_source_is_hashed_by_what_is_read_of_it(tmp_path: Path) -> None:
    folder = site(tmp_path / "beer", [question(1)], [{"Id": "7", "DisplayName": "Ada"}])
    given = load_recipe("quickstart", {"data.source": f"[{folder}, {folder}/Posts.xml]"})
    before = source_hashes(given)
    assert set(before) == {str(folder), f"{folder}/Posts.xml"}
    (folder / "runs").mkdir()
    (folder / "runs" / "recipe.yaml").write_text("a run inside the source")
    assert source_hashes(given) == before
    (folder / "Users.xml").write_bytes(b"other users")
    assert [source for source, found in source_hashes(given).items() if found == before[source]] == []
    assert source_hashes(load_recipe("quickstart")) == {}


@pytest.mark.parametrize(("name", "message"), [("x" * 5000, "cannot be read"), ("absent", "does not exist")])
def test_a_source_that_cannot_be_read_is_told_as_such(name: str, message: str) -> None:
    with pytest.raises(DumpError, match=message):
        source_hashes(load_recipe("quickstart", {"data.source": name}))


def test_an_answer_that_is_cut_off_needs_room_for_its_eos() -> None:
    assembled = assembled_run()
    given = load_recipe(
        "quickstart",
        {
            "sft.max_tokens": "32",
            "reward.max_question_tokens": "16",
            "reward.max_answer_tokens": "16",
            "ppo.max_prompt_tokens": "40",
            "ppo.max_new_tokens": "23",
            "evaluate.max_new_tokens": "null",
        },
    )
    check_fits(given, LoadedBase(assembled.trunk.model, assembled.tokenizer, "a model", 64))  # 40 + 23 + 1
    with pytest.raises(ModelError, match=r"max_new_tokens \+ 1 is 64, but a model has a context of 63"):
        check_fits(given, LoadedBase(assembled.trunk.model, assembled.tokenizer, "a model", 63))


def test_a_sampler_that_is_not_installed_is_named_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    prepare_machine(load_recipe("quickstart"))
    with pytest.raises(ModelError, match=r"pip install 'stackllama\[vllm\]'"):
        prepare_machine(load_recipe("quickstart", {"ppo.sampler": "vllm", "ppo.method": "lora"}))
