"""Reading a run folder: torn logs are forgiven, numbers are numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stackllama.errors import RunError
from stackllama.report.reading import number, policy_method, read_events, read_log, read_run


def test_log_survives_kills(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": 3.0}',
        '{"step": 2, "loss": 2.5}',
        '{"step": 3, "lo{"step": 2, "loss": 2.25}',  # killed in mid-line; the resumed process went on there
        '{"step": 2, "loss": 2.0, "accuracy": NaN}',  # ... and did step 2 again
        '{"step": 2, "perplexity": 8.0}',
        '{"step": 3, "loss": true, "note": "text"}',
        '{"step": 4, "loss": 1.0',
    ]
    path.write_text("\n".join(lines), "utf-8")
    log, torn = read_log(path)
    assert log == {"loss": ((1.0, 3.0), (2.0, 2.0)), "perplexity": ((2.0, 8.0),)}
    assert torn == 2
    assert read_log(tmp_path / "absent.jsonl") == ({}, 0)


def test_events_of_the_guard_are_read_and_the_last_of_a_step_holds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 7, "loss": 1.0, "guard": "skipped", "guard_metric": "loss"}',
        '{"step": 3, "loss": 3.0, "guard": "clipped"}',
        '{"step": 4, "loss": 3.0, "guard": 7}',
        '{"step": 5, "guard": "skipped"}',
        '{"step": 5, "loss": 2.0}',  # a resumed process did step 5 again
        '{"step": 9, "guard": "sk',
    ]
    path.write_text("\n".join(lines), "utf-8")
    assert [(event["step"], event["guard"]) for event in read_events(path)] == [(3, "clipped"), (7, "skipped")]
    assert read_events(tmp_path / "absent.jsonl") == []


def test_only_finite_numbers_are_numbers() -> None:
    tree = {"a": {"b": 2, "c": True, "d": float("inf"), "e": "3"}}
    assert number(tree, "a", "b") == 2.0
    assert [number(tree, "a", key) for key in "cdef"] == [None] * 4
    assert number(tree, "a", "b", "c") is None
    assert number(None, "a") is None


@pytest.mark.parametrize(
    "damaged",
    [
        {"ppo": 3},
        {"sft": None},
        {"ppo": []},
        {"reward": {"accuracy": "high"}},
        {"reward": {"mystery": 1.0}},
        {"gold": {"sft": float("nan")}},
        {"mystery": 1.0},
    ],
)
def test_a_summary_that_does_not_fit_its_schema_is_refused(tmp_path: Path, damaged: dict[str, Any]) -> None:
    summary = {"name": "x", "data": {"questions": 3}}
    (tmp_path / "summary.json").write_text(json.dumps(summary), "utf-8")
    assert read_run(tmp_path).summary == summary
    (tmp_path / "summary.json").write_text(json.dumps(summary | damaged), "utf-8")
    with pytest.raises(RunError, match=rf"summary.json: {next(iter(damaged))}.* does not fit"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ({}, "PPO"),
        ({"ppo": {"advantage": "gae"}}, "PPO"),
        ({"ppo": {"advantage": "rloo"}}, "RLOO"),
        ({"ppo": {"advantage": "grpo"}}, "GRPO"),
        ({"ppo": {"advantage": "reinforce"}}, "REINFORCE"),
        ({"policy": "ppo", "ppo": {"advantage": "rloo"}}, "RLOO"),
        ({"ppo": {"advantage": "best"}}, "rejection sampling"),
        ({"policy": "dpo", "ppo": {"advantage": "gae"}}, "DPO"),
        ({"policy": "dpo", "dpo": {"loss": "ipo"}}, "IPO"),
        ({"policy": 3, "ppo": None}, "PPO"),
    ],
)
def test_a_method_has_its_name_in_the_field(recipe: dict[str, Any], name: str) -> None:
    assert policy_method(recipe) == name
