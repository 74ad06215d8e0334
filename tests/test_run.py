from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stackllama import run as run_module
from stackllama.environment import changes, environment
from stackllama.errors import RunError
from stackllama.files import atomic_write_json, atomic_write_text, read_json
from stackllama.recipe import Recipe
from stackllama.recipe_load import known_keys, load_recipe, section_of
from stackllama.run import (
    NEEDS,
    POLICY_STAGES,
    STAGES,
    Run,
    differing_keys,
    find_run,
    first_touched,
    needs,
    open_run,
    policy_stage,
    stage_outputs,
)


def recipe(folder: Path, **changed: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", "folder": str(folder), "data": {"source": "embedded"}} | changed)


def complete(run: Run, stage: str, *, digest: str = "1", inputs: Mapping[str, str] | None = None) -> list[str]:
    remarks = run.begin(stage, inputs=inputs)
    atomic_write_text(run.stage(stage) / "work", digest)
    run.finish(stage, outputs={"final": digest})
    return remarks


def fail(given: Recipe) -> None:
    """A run whose first stage finds its input missing."""
    with open_run(given) as run:
        run.begin("data")
        atomic_write_text(run.stage("data") / "seconds.json", "0.1")
        raise RunError("the dump is missing")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("policy", ["ppo", "dpo"])
def test_a_run_goes_through_its_stages(tmp_path: Path, policy: str) -> None:
    given = recipe(tmp_path, policy=policy)
    with open_run(given) as run:
        assert run.folder == tmp_path / "x"
        assert not any(run.is_complete(stage) for stage in STAGES)
        for stage in given.stages:
            run.require(stage)
            assert complete(run, stage) == []
            assert run.is_complete(stage)
    assert load_recipe(tmp_path / "x" / "recipe.yaml") == given
    with open_run(given) as run:
        assert all(run.is_complete(stage) for stage in given.stages)
        assert run.outputs("sft") == {"final": "1"}
    assert find_run("x", str(tmp_path)) == find_run(str(tmp_path / "x")) == tmp_path / "x"


def test_lineage_ties_the_stages_together(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        complete(run, "data", inputs={"dump": "d"})
        complete(run, "sft", inputs={"base": "b"})
    lineage = read_json(tmp_path / "x" / "lineage.json")
    assert lineage["stages"]["data"]["inputs"] == {"dump": "d"}
    assert lineage["stages"]["sft"]["inputs"].keys() == {"data", "base"}
    assert lineage["stages"]["sft"]["outputs"] == {"final": "1"}
    here = lineage["stages"]["sft"]["environment"]
    assert here["threads"] >= 1
    assert {"torch", "transformers", "peft", "tokenizers"} <= here["packages"].keys()


@pytest.mark.parametrize("stage", [stage for stage in STAGES if NEEDS[stage]])
def test_a_stage_says_what_to_type_first(tmp_path: Path, stage: str) -> None:
    def too_early() -> None:
        with open_run(recipe(tmp_path)) as run:
            run.begin(stage)

    with pytest.raises(RunError, match=r"needs data, which has not been run.*first type: stackllama data") as caught:
        too_early()
    assert names(tmp_path / "x") == ["recipe.yaml"]
    assert load_recipe(shlex.split(str(caught.value))[-1]) == recipe(tmp_path)
    with open_run(recipe(tmp_path)) as run:
        complete(run, "data")
        run.begin("sft")
        atomic_write_text(run.stage("sft") / "half", "")
        if stage != "sft":
            with pytest.raises(RunError, match=r"needs sft, which is not complete.*stackllama sft"):
                run.begin(stage)


def test_the_judge_comes_from_the_reward_command(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        for stage in ("data", "sft", "reward"):
            complete(run, stage)
        for stage in ("ppo", "evaluate"):
            with pytest.raises(RunError, match=r"needs judge.*stackllama reward"):
                run.require(stage)


def test_what_stands_on_something_made_again_differently_is_refused(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        for stage in ("data", "sft", "reward"):
            complete(run, stage)
        complete(run, "sft", digest="1")
        assert run.is_complete("reward")  # made again, the same
        complete(run, "sft", digest="2")
        with pytest.raises(RunError, match=r"reward was made from another sft"):
            run.is_complete("reward")
        with pytest.raises(RunError, match=r"reward was made from another sft"):
            run.begin("reward")


def test_a_stage_does_not_go_on_from_other_inputs(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        run.begin("data", inputs={"dump": "a"})
        run.begin("data", inputs={"dump": "b"})  # nothing was written yet
        atomic_write_text(run.stage("data") / "work" / "plan.json", "")
        run.begin("data", inputs={"dump": "a"})  # the work is not gone on with
        run.begin("data", inputs={"dump": "b"})
        atomic_write_text(run.stage("data") / "manifest.json", "")
        with pytest.raises(RunError, match=r"data was made from another dump"):
            run.begin("data", inputs={"dump": "a"})


def test_a_recipe_that_differs_where_a_stage_has_begun_is_refused(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        for stage in ("data", "sft", "reward"):
            complete(run, stage)
    with pytest.raises(RunError) as caught:
        open_run(recipe(tmp_path, sft={"epochs": 2}, ppo={"steps": 7}))
    message = str(caught.value)
    assert "sft.epochs: 1.0 -> 2.0" in message
    assert "ppo.steps" not in message  # PPO has not begun
    assert message.endswith(f"rm -r {tmp_path / 'x' / 'sft'} {tmp_path / 'x' / 'reward'}")
    assert load_recipe(tmp_path / "x" / "recipe.yaml") == recipe(tmp_path)
    with open_run(recipe(tmp_path, ppo={"steps": 7}, compute={"checkpoint_steps": 3})):
        pass
    assert load_recipe(tmp_path / "x" / "recipe.yaml").ppo.steps == 7


def test_data_that_hold_nothing_but_work_take_another_recipe(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        run.begin("data")
        atomic_write_text(run.stage("data") / "work" / "plan.json", "")
    with open_run(recipe(tmp_path, seed=1)) as run:
        assert names(run.stage("data")) == ["work"]
        atomic_write_text(run.stage("data") / "manifest.json", "")
    with pytest.raises(RunError, match="seed: 1 -> 2"):
        open_run(recipe(tmp_path, seed=2))


def test_every_key_is_known_to_touch_a_stage_or_nothing() -> None:
    keys = {key for key, field in known_keys() if section_of(field) is None}
    untouching = {key for key in keys if {first_touched(key, policy) for policy in POLICY_STAGES} == {None}}
    assert untouching == {
        "name",
        "folder",
        "data.address",
        "compute.threads",
        "compute.device",
        "compute.engine",
        "compute.recompute_activations",
        "compute.checkpoint_steps",
        "compute.log_steps",
        "track",
    }
    assert (first_touched("ppo.kl.target"), first_touched("base.model"), first_touched("seed")) == (
        "ppo",
        "sft",
        "data",
    )
    # Keys of the evaluate section that earlier stages read: their numbers stand in the summary as well.
    assert first_touched("evaluate.perplexity_answers") == "sft"
    assert {first_touched("evaluate.resamples"), first_touched("evaluate.confidence")} == {"sft"}
    # A stage that trains in full makes the trunk fp32 for all.
    assert {first_touched(f"{name}.method", "dpo") for name in ("reward", "ppo", "dpo")} == {"sft"}
    # A section that does not make the policy touches nothing, but for what the evaluation reads of it.
    assert (first_touched("dpo.beta", "dpo"), first_touched("dpo.beta", "ppo")) == ("dpo", None)
    assert (first_touched("ppo.clip", "dpo"), first_touched("ppo.max_new_tokens", "dpo")) == (None, "dpo")
    # Watching is of the stage that makes the policy, whichever that is.
    assert (first_touched("watch.every"), first_touched("watch.limits.length", "dpo")) == ("ppo", "dpo")


@pytest.mark.parametrize(("made", "other"), [("ppo", "dpo"), ("dpo", "ppo")])
def test_the_evaluation_stands_on_the_stage_that_makes_the_policy(tmp_path: Path, made: str, other: str) -> None:
    given = recipe(tmp_path, policy=made)
    with open_run(given) as run:
        for stage in ("data", "sft", "reward", "judge"):
            complete(run, stage)
        with pytest.raises(RunError, match=rf"evaluate needs {made}.*first type: stackllama {made} "):
            run.require("evaluate")
        complete(run, made)
        complete(run, "evaluate")
        assert made in run.lineage()["stages"]["evaluate"]["inputs"]
        assert other not in run.lineage()["stages"]["evaluate"]["inputs"]
        complete(run, made, digest="2")
        with pytest.raises(RunError, match=rf"evaluate was made from another {made}"):
            run.is_complete("evaluate")
    assert policy_stage(tmp_path / "x") == made
    assert needs("evaluate", made)[-1] == made
    with open_run(recipe(tmp_path, policy=made, **{other: {"learning_rate": 0.5}})):  # which makes nothing here
        pass
    with pytest.raises(RunError, match=rf"policy: {made} -> {other}"):
        open_run(recipe(tmp_path, policy=other))


@pytest.mark.parametrize("policy", ["ppo", "dpo"])
def test_a_policy_needs_reward_model_and_judge_which_watch_it(tmp_path: Path, policy: str) -> None:
    with open_run(recipe(tmp_path, policy=policy)) as run:
        for stage in ("data", "sft"):
            complete(run, stage)
        with pytest.raises(RunError, match=f"{policy} needs reward"):
            run.require(policy)
        for stage in ("reward", "judge"):
            complete(run, stage)
        run.require(policy)


def test_a_run_that_has_no_policy_yet_takes_another_way_to_it(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        for stage in ("data", "sft", "reward", "judge"):
            complete(run, stage)
    with open_run(recipe(tmp_path, policy="dpo", dpo={"beta": 0.3})) as run:
        run.require("dpo")


def test_differing_keys_are_dotted(tmp_path: Path) -> None:
    changed = recipe(tmp_path, ppo={"lambda": 0.5, "kl": {"target": 1}})
    assert differing_keys(recipe(tmp_path), changed) == {"ppo.lambda": (0.95, 0.5), "ppo.kl.target": (6.0, 1.0)}


def test_other_versions_or_threads_are_remarked_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(recipe(tmp_path, compute={"threads": 1})) as run:
        run.begin("data")
        atomic_write_text(run.stage("data") / "half", "")
        assert run.begin("data") == []
    with open_run(recipe(tmp_path, compute={"threads": 2})) as run:
        assert run.begin("data") == ["threads was 1 and is 2: data goes on, but its bits will differ"]
    here = environment(1, None)
    older = {**here, "packages": {**here["packages"], "torch": "1.0"}}
    assert list(changes(older, here)) == [f"torch was 1.0 and is {here['packages']['torch']}"]
    assert list(changes(here, environment(1, "NVIDIA H200"))) == ["accelerator was None and is NVIDIA H200"]


def test_nothing_is_left_of_a_run_that_never_began(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the dump is missing"):
        fail(recipe(tmp_path))
    assert names(tmp_path) == []


def test_what_was_there_before_outlives_a_run_that_never_began(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(RunError, match="the dump is missing"):
        fail(recipe(tmp_path))
    assert names(tmp_path / "x") == []
    atomic_write_text(tmp_path / "x" / "recipe.yaml", f"{{name: x, folder: {tmp_path}, data: {{source: embedded}}}}")
    with pytest.raises(RunError, match="the dump is missing"):
        fail(load_recipe(tmp_path / "x"))
    assert names(tmp_path / "x") == ["recipe.yaml"]
    assert load_recipe(tmp_path / "x") == recipe(tmp_path)


def test_a_run_opens_where_it_lies_and_its_recipe_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(recipe(tmp_path)) as run:
        complete(run, "data")
    (tmp_path / "x").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    with open_run(recipe(tmp_path), Path()) as run:
        assert run.name == "moved"
        assert run.is_complete("data")
    assert load_recipe(tmp_path / "moved") == recipe(tmp_path)


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "x" / "thesis.txt", "years of work")
    with pytest.raises(RunError, match=r"is no run"):
        open_run(recipe(tmp_path))
    assert names(tmp_path / "x") == ["thesis.txt"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "x", "")
    with pytest.raises(RunError, match=r"x cannot be (made|written)"):
        open_run(recipe(tmp_path))


HOLD = """
import sys, time
from stackllama.recipe import Recipe
from stackllama.run import open_run
with open_run(Recipe(name="x", folder=sys.argv[1], data={"source": "embedded"})) as run:
    run.begin("data")
    (run.stage("data") / "half").write_text("")
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_share_a_run_and_a_kill_lets_go(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"in use by another process \({holder.pid}\)"):
            open_run(recipe(tmp_path))
        holder.send_signal(signal.SIGKILL)
    for _ in range(100):
        try:
            with open_run(recipe(tmp_path)) as run:
                assert names(run.stage("data")) == ["half"]
            break
        except RunError:
            time.sleep(0.01)
    else:
        pytest.fail("the lock outlived its process")


def test_a_lock_that_its_owner_removed_is_not_taken_for_one(tmp_path: Path) -> None:
    first = open_run(recipe(tmp_path))
    first.close()  # nothing had begun: the folder and its lock are gone
    with open_run(recipe(tmp_path)), pytest.raises(RunError, match="in use"):
        open_run(recipe(tmp_path))


def test_unknown_runs_list_the_known_ones(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        complete(run, "data")
    with pytest.raises(RunError, match=r"nope is not a run.*there is: x"):
        find_run("nope", str(tmp_path))


DAMAGED_RECORDS: list[Any] = [
    [],
    {"outputs": {}},
    {"inputs": 3, "outputs": {}, "environment": {}},
    {"inputs": {}, "outputs": ["final"], "environment": {}},
    {"inputs": {}, "outputs": {"final": 1}, "environment": {}},
    {"inputs": {}, "outputs": {}, "environment": None},
]


@pytest.mark.parametrize("mark", DAMAGED_RECORDS)
def test_a_broken_mark_is_named(tmp_path: Path, mark: Any) -> None:
    with open_run(recipe(tmp_path)) as run:
        complete(run, "data")
        atomic_write_json(run.stage("data") / "complete.json", mark)
        for look in (run.is_complete, run.outputs, lambda stage: stage_outputs(run.folder, stage)):
            with pytest.raises(RunError, match=r"delete .*data and run data again"):
                look("data")


@pytest.mark.parametrize("record", DAMAGED_RECORDS)
def test_a_broken_lineage_is_named(tmp_path: Path, record: Any) -> None:
    with open_run(recipe(tmp_path)) as run:
        complete(run, "data")
        for stages in ({"data": record}, [record]):
            atomic_write_json(run.folder / "lineage.json", {"format": 1, "recipe": "", "stages": stages})
            with pytest.raises(RunError, match=r"lineage.json is damaged"):
                run.begin("data")
        (run.folder / "lineage.json").write_text('{"format": 99}')
        with pytest.raises(RunError, match="another version"):
            run.lineage()


def test_outputs_are_read_without_the_lock(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path)) as run:
        complete(run, "data", digest="d")
        assert stage_outputs(run.folder, "data") == {"final": "d"}
        with pytest.raises(RunError, match=r"sft has not been run in .*first type: stackllama sft \S+/x/recipe.yaml"):
            stage_outputs(run.folder, "sft")


def test_stages_stand_in_an_order_that_their_needs_allow() -> None:
    for stage, earliest in NEEDS.items():
        assert all(STAGES.index(earlier) < STAGES.index(stage) for earlier in earliest)
    assert set(run_module.COMMANDS) == set(STAGES)
    assert run_module.available_threads() <= (os.cpu_count() or 1)
