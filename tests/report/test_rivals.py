"""Rivals: grouped by what they stand on, each needing its exam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stackllama.errors import RunError
from stackllama.files import atomic_write_json
from stackllama.report.rivals import differs, groups, read_rivals
from stackllama.run import STAGES

KL = (0.0, 1.0, 2.0, 3.0)


def ended(low: float, name: str, width: float = 0.2) -> dict[str, float]:
    return {name: low, f"{name}_low": low - width, f"{name}_high": low + width}


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    advantage: str = "gae",
    shared: str = "a",
    best_of: int = 0,
    up_to: int = 4,
    **ppo: Any,
) -> Path:
    """A run as the stages leave it; its judge gains half of its KL, the reward twice that, gold a quarter."""
    gold = {"gold": {"sft": 0.4, "ppo": 0.6, "difference": 0.2, "low": 0.1, "high": 0.3}}
    recipe = {"seed": seed, "ppo": {"advantage": advantage, "max_new_tokens": 48, **ppo}, "evaluate": {"prompts": 64}}
    for stage in STAGES:
        record = {"inputs": {}, "outputs": {"final": f"{stage} {seed}"}, "environment": {}}
        (folder / stage).mkdir(parents=True)
        atomic_write_json(folder / stage / "complete.json", record)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    numbers = {"reward_before": 0.1, "reward_after": 1.5, "steps": 40, "chosen_step": 20, "length_difference_low": 1.0}
    numbers |= ended(0.75, "win_rate", 0.05) | ended(0.9, "win_rate_training_reward", 0.05) | ended(KL[up_to - 1], "kl")
    summary: dict[str, Any] = {"ppo": numbers, "seconds": {"ppo": 350.0}, **gold}
    answers = {"reward": 0.1, "judge": 0.2, "length": 17.0, "eos_rate": 0.99, "kl": 0.0, "gold": 0.4}
    gains = ended(1.0, "reward_gain") | ended(0.5, "judge_gain") | ended(0.3, "gold_gain")
    policy = {"sft": answers, "ppo": answers | {"reward": 1.5, "kl": KL[up_to - 1], "gold": 0.6} | gains}
    if best_of:
        bound = {16: 1.8351, 4: 0.6363}[best_of]
        found = ended(0.7, "win_rate", 0.05) | {"gold": 0.5, "gold_difference": 0.1, "gold_low": 0.0, "gold_high": 0.2}
        summary["best_of"] = {"n": best_of, "kl_bound": bound, "reward": 1.2, "judge": 0.8, **found}
        policy["best_of"] = answers | {"reward": 1.2, "kl": bound} | gains
    atomic_write_json(folder / "summary.json", summary)
    atomic_write_json(folder / "evaluate" / "policy.json", policy)
    lines = []
    for at, nats in enumerate(KL[:up_to]):
        gains = ended(nats, "reward_gain") | ended(nats / 2, "judge_gain") | ended(nats / 4, "gold_gain")
        lines.append(
            json.dumps({"step": 10 * at, "rounds": 5 * at, "kl": nats, "judge": nats, "reward": nats, **gains})
        )
    (folder / "ppo" / "watch.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_runs_on_the_same_stages_are_one_group_and_seeds_stay_apart(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "s0-ppo"),
        make_run(tmp_path / "s1-ppo", seed=1),
        make_run(tmp_path / "s0-rloo", advantage="rloo"),
    ]
    several = groups(read_rivals(folders))
    assert [[rival.name for rival in group.rivals] for group in several] == [["s0-ppo", "s0-rloo"], ["s1-ppo"]]
    assert differs(several) == ["data", "SFT model", "reward model", "judge", "exam"]
    assert differs(several[:1]) == []


def test_an_exam_of_other_questions_is_told_apart(tmp_path: Path) -> None:
    several = groups(read_rivals([make_run(tmp_path / "a"), make_run(tmp_path / "b", max_new_tokens=64)]))
    assert differs(several) == ["exam"]


def test_where_to_compare_is_the_bound_of_best_of_n_or_the_smallest_final_kl(tmp_path: Path) -> None:
    short, long = make_run(tmp_path / "short", up_to=3), make_run(tmp_path / "long")
    with_best = make_run(tmp_path / "best", best_of=16)
    assert groups(read_rivals([long, short]))[0].kl() == 2.0
    assert groups(read_rivals([long, short, with_best]))[0].kl() == 1.8351
    log = short / "ppo" / "watch.jsonl"
    *before, last = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in (*before, last | {"kl": -0.01})), "utf-8")
    assert groups(read_rivals([long, short]))[0].kl() == 3.0  # the other stands where it began
    for folder in (long, short):
        (folder / "ppo" / "watch.jsonl").unlink()
    assert groups(read_rivals([long, short]))[0].kl() is None


def test_a_missing_exam_names_the_command_and_a_run_is_named_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with pytest.raises(RunError, match="a is given twice; name each run once"):
        read_rivals([run, run])
    (run / "evaluate" / "complete.json").unlink()
    with pytest.raises(RunError, match=r"evaluate is not complete in .*a; first type: stackllama evaluate .*a/recipe"):
        read_rivals([run])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "one" / "x"), make_run(tmp_path / "two" / "x")]
    assert [rival.name for rival in read_rivals(folders)] == [str(folder) for folder in folders]
