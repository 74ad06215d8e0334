"""Starting from another run: what is the same comes over whole, the rest is made anew, the other run stays as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from stackllama.errors import RunError
from stackllama.files import atomic_write_json, atomic_write_text, read_json
from stackllama.recipe import Recipe
from stackllama.run import STAGES, Run, open_run
from stackllama.summary import ADDED_BY, Summary, merge_summary, read_summary
from stackllama.taking_over import find_source, take_over

NUMBERS: dict[str, dict[str, Any]] = {
    "data": {"data": {"questions": 9}},
    "sft": {"sft": {"perplexity_after": 4.5}},
    "reward": {"reward": {"accuracy": 0.75}},
    "judge": {"judge": {"accuracy": 0.5}},
    "ppo": {"ppo": {"steps": 7, "chosen_because": "the judge likes it"}},
    "dpo": {"dpo": {"steps": 5}},
    "evaluate": {"ppo": {"win_rate": 0.625}, "gold": {"sft": 0.25}},
}


JOURNEY = ("data", "sft", "reward", "judge", "ppo", "evaluate")


def recipe(folder: Path, name: str, **changed: Any) -> Recipe:
    values = {"name": name, "folder": str(folder), "data": {"source": "embedded"}}
    return Recipe.model_validate(values | changed)


def complete(run: Run, stage: str, digest: str = "1") -> None:
    run.begin(stage)
    folder = run.stage(stage)
    (folder / "final").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    for name in ("final/role.safetensors", "metrics.jsonl", "checkpoints/step-1/state.safetensors"):
        atomic_write_text(folder / name, f"{stage} {digest}\n")
    merge_summary(run.folder, {"confidence": 0.95, **NUMBERS[stage], "seconds": {stage: 2.0}})
    run.finish(stage, outputs={"final": digest})


def finished(folder: Path, *stages: str, **changed: Any) -> Path:
    with open_run(recipe(folder, "old", **changed)) as run:
        for stage in stages:
            complete(run, stage)
    return run.folder


def start(given: Recipe, source: Path) -> str:
    with open_run(given) as run:
        return take_over(given, run, source)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_comes_before_the_first_touched_stage_is_taken_over(tmp_path: Path) -> None:
    old = finished(tmp_path, *JOURNEY)
    given = recipe(tmp_path, "new", ppo={"steps": 3})
    said = start(given, old)
    assert said == f"taken over from {old}: data, sft, reward, judge; ppo is this run's own (ppo.steps differs)"
    with open_run(given) as run:
        assert [stage for stage in JOURNEY if run.is_complete(stage)] == ["data", "sft", "reward", "judge"]
        complete(run, "ppo", "2")
        complete(run, "evaluate", "2")
    assert (old / "ppo" / "metrics.jsonl").read_text() == "ppo 1\n"


def test_the_numbers_and_the_lineage_of_what_was_taken_over_come_with_it(tmp_path: Path) -> None:
    old = finished(tmp_path, *JOURNEY)
    start(recipe(tmp_path, "new", evaluate={"prompts": 5}), old)
    summary = read_summary(tmp_path / "new").model_dump(exclude_none=True)
    # Of the section `ppo` only what the training added: the win rate is the exam's, which is made anew.
    assert summary["ppo"] == {"steps": 7, "chosen_because": "the judge likes it"}
    assert (summary["name"], summary["confidence"], summary["gold"]) == ("new", 0.95, {})
    assert summary["seconds"] == {"data": 2.0, "sft": 2.0, "reward": 2.0, "judge": 2.0, "ppo": 2.0, "total": 10.0}
    theirs, ours = (read_json(folder / "lineage.json") for folder in (old, tmp_path / "new"))
    assert ours["recipe"] != theirs["recipe"]
    assert ours["stages"].keys() == set(JOURNEY) - {"evaluate"}
    for stage, record in ours["stages"].items():
        assert record == theirs["stages"][stage] | {"from": "old"}
        assert (tmp_path / "new" / stage / "complete.json").read_bytes() == (old / stage / "complete.json").read_bytes()


def test_a_policy_by_dpo_comes_with_its_numbers(tmp_path: Path) -> None:
    old = finished(tmp_path, "data", "sft", "reward", "judge", "dpo", "evaluate", policy="dpo")
    said = start(recipe(tmp_path, "new", policy="dpo", evaluate={"prompts": 5}), old)
    assert said.endswith("judge, dpo; evaluate is this run's own (evaluate.prompts differs)")
    summary = read_summary(tmp_path / "new")
    assert (summary.dpo.steps, summary.seconds.dpo, summary.ppo.win_rate) == (5, 2.0, None)


@pytest.mark.parametrize(("there", "here"), [("ppo", "dpo"), ("dpo", "ppo")])
def test_another_way_to_a_policy_takes_over_what_both_stand_on(tmp_path: Path, there: str, here: str) -> None:
    old = finished(tmp_path, "data", "sft", "reward", "judge", there, policy=there)
    said = start(recipe(tmp_path, "new", policy=here), old)
    assert said == f"taken over from {old}: data, sft, reward, judge; {here} is this run's own (policy differs)"


def test_every_number_has_the_stage_that_adds_it() -> None:
    for section, numbers in Summary().model_dump().items():
        for key in numbers or ():
            if (section, key) != ("seconds", "total"):
                assert ADDED_BY.get(f"{section}.{key}", ADDED_BY.get(section)) in STAGES, (section, key)


def test_weights_are_linked_logs_copied_and_checkpoints_left(tmp_path: Path) -> None:
    old = finished(tmp_path, "data")
    start(recipe(tmp_path, "new"), old)
    new = tmp_path / "new"
    assert files(new / "data") == {"final/role.safetensors", "metrics.jsonl", "complete.json"}
    assert (new / "data/final/role.safetensors").samefile(old / "data/final/role.safetensors")
    with (new / "data/metrics.jsonl").open("a") as log:
        log.write("more\n")
    assert (old / "data/metrics.jsonl").read_text() == "data 1\n"


def test_where_links_do_not_exist_weights_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    old = finished(tmp_path, "data")
    start(recipe(tmp_path, "new"), old)
    weights = tmp_path / "new/data/final/role.safetensors"
    assert weights.read_text() == "data 1\n"
    assert not weights.samefile(old / "data/final/role.safetensors")


def test_killed_on_the_way_it_leaves_whole_stages_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = finished(tmp_path, "data", "sft", "reward")
    given = recipe(tmp_path, "new")
    with monkeypatch.context() as killed:
        link, done = os.link, [0]

        def stop(*paths: Any) -> None:
            done[0] += 1
            if done[0] == 2:
                raise KeyboardInterrupt
            link(*paths)

        killed.setattr(os, "link", stop)
        with pytest.raises(KeyboardInterrupt):
            start(given, old)
    new = tmp_path / "new"
    assert (new / "data/complete.json").exists()
    assert not (new / "sft").exists()
    assert start(given, old).endswith("data, sft, reward")
    assert files(new / "sft") == {"final/role.safetensors", "metrics.jsonl", "complete.json"}
    assert not [path for path in new.rglob("*") if ".tmp-" in path.name]


def test_the_same_command_again_keeps_what_the_run_has_begun_itself(tmp_path: Path) -> None:
    old = finished(tmp_path, "data", "sft")
    given = recipe(tmp_path, "new")
    start(given, old)
    with open_run(given) as run:
        run.begin("reward")
        atomic_write_text(run.stage("reward") / "half", "mine")
    with open_run(recipe(tmp_path, "old")) as run:
        complete(run, "reward")
    assert start(given, old).endswith(": data, sft")
    assert files(tmp_path / "new" / "reward") == {"half"}


def test_a_stage_that_stands_on_what_was_made_again_is_not_taken_over(tmp_path: Path) -> None:
    old = finished(tmp_path, "data", "sft", "reward")
    with open_run(recipe(tmp_path, "old")) as run:
        complete(run, "sft", "2")
    assert start(recipe(tmp_path, "new"), old).endswith(": data, sft")


def test_nothing_in_common_names_the_keys_and_leaves_nothing_behind(tmp_path: Path) -> None:
    old = finished(tmp_path, *JOURNEY)
    with pytest.raises(RunError, match=r"nothing of .*old can be taken over.*: seed \(0 there, 4 here\); set it as"):
        start(recipe(tmp_path, "new", seed=4), old)
    assert not (tmp_path / "new").exists()


def test_broken_numbers_are_told_before_anything_is_taken(tmp_path: Path) -> None:
    old = finished(tmp_path, "data")
    (old / "summary.json").write_text('{"data": {"quest')
    with pytest.raises(RunError, match=r"old/summary\.json"):
        start(recipe(tmp_path, "new"), old)
    assert not (tmp_path / "new").exists()


def test_a_run_without_a_complete_stage_is_told_what_to_type(tmp_path: Path) -> None:
    with open_run(recipe(tmp_path, "old")) as run:
        run.begin("data")
        atomic_write_json(run.stage("data") / "half", 1)
    with pytest.raises(RunError, match=r"data is not complete in .*old; first type: stackllama data"):
        start(recipe(tmp_path, "new"), run.folder)


def test_the_same_run_and_a_run_begun_otherwise_are_refused(tmp_path: Path) -> None:
    old = finished(tmp_path, "data")
    with pytest.raises(RunError, match=r"is this very run; give the new run another --name"):
        find_source("old", recipe(tmp_path, "old"))
    assert find_source("old", recipe(tmp_path, "new")) == old
    given = recipe(tmp_path, "new")
    with open_run(given) as run:
        complete(run, "data")
    with pytest.raises(RunError, match=r"new has begun already \(data\), and not from .*leave out --from"):
        start(given, old)
