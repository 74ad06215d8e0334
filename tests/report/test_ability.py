"""What lm-eval found, as a table: rows, columns, remarks; and whatever else a file may hold."""

from __future__ import annotations

from typing import Any

import pytest

from stackllama.report.ability import remarks, table, version

ROW = {
    "task": "arc_easy",
    "metric": "acc",
    "filter": "none",
    "part_of": None,
    "documents": 2376,
    "higher_is_better": True,
    "sft": 0.61234,
    "sft_stderr": 0.01,
    "policy": 0.6,
    "policy_stderr": None,
    "difference": -0.01234,
    "difference_low": -0.02,
    "difference_high": 0.005,
}
FOUND: dict[str, Any] = {"lm_eval": "0.4.13", "tasks": ["arc_easy"], "policy": "ppo", "confidence": 0.9, "rows": [ROW]}


def test_a_row_has_both_models_and_the_interval_of_their_difference() -> None:
    shown = table(FOUND, "PPO")
    assert shown is not None
    assert shown.head == ("task", "metric", "documents", "SFT", "PPO", "difference", "90% interval")
    assert shown.rows == [("arc_easy", "acc", "2,376", "0.612 ± 0.010", "0.600", "−0.012", "−0.020 to +0.005")]
    assert version(FOUND) == "0.4.13"


def test_without_a_policy_there_is_the_sft_model_alone() -> None:
    shown = table({**FOUND, "policy": None}, "PPO")
    assert shown is not None
    assert shown.head == ("task", "metric", "documents", "SFT")
    assert shown.rows == [("arc_easy", "acc", "2,376", "0.612 ± 0.010")]


def test_metrics_tell_their_filter_and_direction_and_large_numbers_stay_short() -> None:
    row = {**ROW, "metric": "ppl", "filter": "strict", "higher_is_better": False, "sft": 6.7e13, "sft_stderr": None}
    shown = table({**FOUND, "rows": [{**row, "difference": -4.3e13, "difference_low": None}]}, "PPO")
    assert shown is not None
    assert shown.rows[0][1:] == ("ppl ↓ (strict)", "2,376", "6.7e+13", "0.600", "−4.3e+13", "")


def test_tasks_that_a_group_sums_up_are_shown_where_they_were_asked_for() -> None:
    rows = [{**ROW, "task": "mmlu"}, *({**ROW, "task": name, "part_of": "mmlu"} for name in ("one", "two"))]
    found = {**FOUND, "tasks": ["mmlu", "two"], "rows": rows}
    shown = table(found, "PPO")
    assert shown is not None
    assert [row[0] for row in shown.rows] == ["mmlu", "two"]
    assert "1 more are in evaluate/lm_eval.json: of the tasks that the groups sum up." in remarks(found)


def test_a_limit_and_weights_that_changed_since_are_told() -> None:
    assert "only the first 5 documents" in " ".join(remarks({**FOUND, "limit": 5}))
    found = {**FOUND, "weights": {"sft": {"final": "a"}, "ppo": {"final": "b"}}}
    lineage: dict[str, Any] = {"stages": {"sft": {"outputs": {"final": "a"}}, "ppo": {"outputs": {"final": "b"}}}}
    assert len(remarks(found, lineage)) == len(remarks(found)) == 1
    lineage["stages"]["ppo"]["outputs"] = {"final": "c"}
    assert remarks(found, lineage)[1].startswith("The weights of ppo have changed since")


@pytest.mark.parametrize("rows", [None, [], {}, "x", [1, {"metric": "acc"}, {"task": 3}]])
def test_without_rows_there_is_no_table(rows: Any) -> None:
    assert table({**FOUND, "rows": rows}, "PPO") is None
    assert table({}, "PPO") is None
    assert version({"lm_eval": 3}) == ""
