"""What the report says of a judge behind an address, and that it says nothing where there was none."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from stackllama.report.judged import money, sentences, short_name, table, win_rates
from stackllama.report.page import write_report

POLICY = {
    "questions": 90,
    "won": 50,
    "lost": 20,
    "equal": 4,
    "unreadable": 10,
    "win_rate": 0.667,
    "win_rate_low": 0.6,
    "win_rate_high": 0.73,
    "win_rate_length_controlled": None,
    "disagreement": 0.2,
    "disagreement_low": 0.1,
    "disagreement_high": 0.3,
    "first_place": 0.55,
    "agreement": {"judge": {"questions": 70, "share": 0.81, "share_low": 0.7, "share_high": 0.9}},
}
FOUND: dict[str, Any] = {
    "model": "owner/<script>judge-7b",
    "left": 12,
    "unasked": 0,
    "requests": 100,
    "cached": 92,
    "tokens_in": 41000,
    "tokens_out": 9000,
    "tokens_counted": True,
    "cost": 0.0123,
    "policies": {"ppo": POLICY, "best_of": POLICY | {"win_rate": 0.5}},
}


def write_run(folder: Path, *, digest: str | None = None) -> Path:
    (folder / "evaluate").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"ppo": {"win_rate": 0.7}}), "utf-8")
    samples = json.dumps([{"question": "Q?", "answers": []}])
    (folder / "evaluate" / "samples.json").write_text(samples, "utf-8")
    found = FOUND | {"samples": digest or hashlib.sha256(samples.encode()).hexdigest()}
    (folder / "asked").mkdir()
    (folder / "asked" / "judge.json").write_text(json.dumps(found), "utf-8")
    return folder


def test_the_report_has_a_row_a_table_and_sentences(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "try")).read_text("utf-8")
    assert "owner/&lt;script&gt;judge-7b as judge" in page
    assert "<script>" not in page
    assert "PPO, &lt;script&gt;judge-7b" in page  # in the figure, without what stands before the last slash
    assert "66.7%" in page
    assert "another verdict in 20.0% [10.0% to 30.0%] of the questions" in page
    assert "81.0% [70.0% to 90.0%]" in page
    assert "192 replies; 41,000 tokens read and 9,000 written, 0.012 at the prices given." in page
    assert "Left out: 12 questions of the exam" in page


@pytest.mark.parametrize("gone", [True, False])
def test_without_a_judge_or_of_other_answers_the_report_says_nothing(tmp_path: Path, gone: bool) -> None:
    folder = write_run(tmp_path / "try", digest="0" * 64)
    if gone:
        (folder / "asked" / "judge.json").unlink()
    page = write_report(folder).read_text("utf-8")
    assert "as judge" not in page
    assert "another verdict" not in page


def test_columns_and_rows_by_policy() -> None:
    labels = {"ppo": "PPO", "best_of": "best of 16"}
    found = table(FOUND, labels)
    assert found.head == ("", "PPO", "best of 16")
    assert ("win rate over SFT", "66.7% [60.0% to 73.0%]", "50.0% [60.0% to 73.0%]") in found.rows
    assert ("left out: no readable verdict", "10", "10") in found.rows
    shown = [label for label, *_ in win_rates(FOUND, labels)]
    assert shown == ["PPO, <script>judge-7b", "best of 16, <script>judge-7b"]
    assert table({"policies": {}}, labels).head == ("",)


def test_whose_place_is_told() -> None:
    other = POLICY | {"disagreement": 0.4, "disagreement_low": None}
    said = list(
        sentences(FOUND | {"policies": {"ppo": POLICY, "best_of": other}}, {"ppo": "PPO", "best_of": "best of 16"})
    )
    assert said[0].startswith("PPO: asked in both orders, the judge gave another verdict in 20.0% [10.0% to 30.0%] of")
    assert said[1].startswith("Best of 16: asked in both orders, the judge gave another verdict in 40.0% of")
    assert not said[2].startswith("Best")


def test_short_names_and_small_money() -> None:
    assert short_name({"model": "models/q.gguf"}) == "q.gguf"
    assert len(short_name({"model": "x" * 90})) == 28
    assert short_name({}) == "judge"
    assert [money(value) for value in (0, 0.00046, 0.5, 1234.5)] == ["0.00", "0.00046", "0.50", "1,234.50"]


def test_tokens_that_nobody_counted_are_about_so_many() -> None:
    assert list(sentences({"tokens_in": 10, "tokens_out": 2})) == [
        "0 replies; about 10 tokens read and about 2 written."
    ]
