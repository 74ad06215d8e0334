"""The comparison: a row for each that answered, equal KL with what was not reached said, nothing pooled."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.report.test_rivals import make_run

from stackllama.report.comparison import exam_table, kl_table, remarks, rows, rows_at, title, to_json
from stackllama.report.rivals import Group, groups, read_rivals


@pytest.fixture
def group(tmp_path: Path) -> Group:
    folders = [
        make_run(tmp_path / "ppo", best_of=16),
        make_run(tmp_path / "rloo", advantage="rloo", up_to=2),
        make_run(tmp_path / "other", up_to=3),
    ]
    return groups(read_rivals(folders))[0]


def test_a_row_for_sft_best_of_n_and_each_run(group: Group) -> None:
    found = rows(group)
    assert [(row["name"], row["method"]) for row in found] == [
        ("SFT", "SFT"),
        ("best of 16", "best-of-n"),
        ("ppo", "PPO"),
        ("rloo", "RLOO"),
        ("other", "PPO"),
    ]
    sft, best, ppo, *_ = found
    assert (sft["reward"], sft["gold"], sft["kl"]) == (0.1, 0.4, 0.0)
    assert (best["kl_bound"], best["gold_difference"], best["gold_difference_high"]) == (1.8351, 0.1, 0.2)
    assert (ppo["win_rate"], ppo["kl"], ppo["steps"], ppo["seconds"]) == (0.75, 3.0, 40, 350.0)
    assert (ppo["gold_difference"], ppo["gold_difference_low"]) == (0.2, 0.1)


def test_at_equal_kl_and_who_never_reached_it(group: Group) -> None:
    best, ppo, rloo, other = rows_at(group, 1.84)
    assert (best["name"], best["kl_bound"], best["judge_gain"]) == ("best of 16", 1.8351, 0.5)
    assert ppo["judge_gain"] == pytest.approx(0.92)  # half of 1.84
    assert ppo["judge_gain_low"] == pytest.approx(0.72)
    assert (ppo["step"], ppo["rounds"]) == (pytest.approx(18.4), pytest.approx(9.2))
    assert rloo == {"name": "rloo", "method": "RLOO", "reached": False, "most": 1.0}
    assert other["judge_gain"] == ppo["judge_gain"]
    assert [row["name"] for row in rows_at(group, 1.0)] == ["ppo", "rloo", "other"]  # no bound is there
    cells = kl_table(group, 1.84).rows
    assert cells[2][:3] == ("rloo", "RLOO", "reached 1.00 nats at most")
    assert cells[1][2] == "9"
    assert cells[1][4] == "+0.92 [+0.72, +1.12]"


def test_the_table_of_the_exam(group: Group) -> None:
    table = exam_table(group)
    assert table.head == (
        *("", "method", "reward", "judge wins", "gold", "gold over SFT", "KL", "length", "ended", "steps", "seconds"),
    )
    assert table.rows[1][6] == "≤ 1.84"
    assert table.rows[2][3] == "75.0% [70.0, 80.0]"
    assert table.rows[0][3] == "–"


def test_json_has_it_all(group: Group) -> None:
    told = to_json([group], None)
    assert told["differs_in"] == []
    assert told["groups"][0]["at_kl"]["kl"] == 1.8351
    assert told["groups"][0]["rows"] == rows(group)
    assert to_json([group], 1.0)["groups"][0]["at_kl"]["rows"] == rows_at(group, 1.0)


def test_groups_are_told_in_what_they_differ(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    (second / "ppo" / "watch.jsonl").unlink()
    several = groups(read_rivals([first, second]))
    apart, bare = remarks(several)
    assert "the same journey under different seeds" in apart
    assert bare.endswith("without a curve over KL: b.")
    assert title(several[1], several) == "On held-out questions, group 2 (seed 1)"
    assert to_json(several, None)["groups"][1]["at_kl"] is None
    assert [row["name"] for row in to_json(several, 0.5)["groups"][1]["at_kl"]["rows"]] == ["b"]
    assert kl_table(several[1], 0.5).rows[0][2] == "not watched"


def test_evaluations_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    log = run / "ppo" / "watch.jsonl"
    log.write_text(log.read_text()[:-40])  # cut in the last of four lines
    group = groups(read_rivals([run, make_run(tmp_path / "b")]))[0]
    (said,) = remarks([group])
    assert said.endswith("missing from the curves over KL: a (1 line of ppo/watch.jsonl).")
    assert rows_at(group, 2.5)[0] == {"name": "a", "method": "PPO", "reached": False, "most": 2.0}


def test_curves_of_different_prompts_are_told(tmp_path: Path) -> None:
    for name, prompts in (("a", 64), ("b", 8), ("c", 64)):
        log = make_run(tmp_path / name) / "ppo" / "watch.jsonl"
        log.write_text(log.read_text().replace('{"step"', f'{{"prompts": {prompts}, "step"'))
    (said,) = remarks(groups(read_rivals([tmp_path / "a", tmp_path / "b", tmp_path / "c"])))
    assert said.endswith("so not of the same: a 64, b 8, c 64.")
    assert remarks(groups(read_rivals([tmp_path / "a", tmp_path / "c"]))) == []


def test_without_gold_there_are_no_columns_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for path in (run / "summary.json", run / "evaluate" / "policy.json", run / "ppo" / "watch.jsonl"):
        path.write_text(path.read_text().replace("gold", "distance" if path.name == "watch.jsonl" else "gold"))
    policy = run / "evaluate" / "policy.json"
    policy.write_text(policy.read_text().replace('"gold', '"was'))
    group = groups(read_rivals([run]))[0]
    assert not [cell for cell in (*exam_table(group).head, *kl_table(group, 1.0).head) if "gold" in cell]
