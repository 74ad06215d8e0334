"""Rivals over seeds: who is the same rival, means and intervals by hand, and where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_rivals import make_run

from stackllama.report.rivals import Group, groups, read_rivals, several_seeds
from stackllama.report.seeds import kinds, tables, to_json, where

GOLD = {"gae": (0.30, 0.40, 0.35), "rloo": (0.28, 0.41, 0.30)}


def journeys(folder: Path, seeds: int = 3, **changes: Any) -> list[Group]:
    """PPO with best-of-16 and RLOO under each seed, with what they gain in gold."""
    folders = []
    for advantage, gains in GOLD.items():
        for seed in range(seeds):
            name = f"s{seed}-{advantage}"
            run = make_run(
                folder / name, seed=seed, advantage=advantage, best_of=16 if advantage == "gae" else 0, **changes
            )
            summary = json.loads((run / "summary.json").read_text())
            summary["gold"]["difference"] = gains[seed]
            (run / "summary.json").write_text(json.dumps(summary))
            folders.append(run)
    return groups(read_rivals(folders))


def test_rivals_are_the_same_under_every_seed(tmp_path: Path) -> None:
    several = journeys(tmp_path)
    assert len(several) == 3
    assert several_seeds(several)
    found = {kind.label: kind.rows for kind in kinds(several)}
    assert list(found) == ["best of 16", "PPO", "RLOO"]
    assert {seed: row["gold_difference"] for seed, row in found["PPO"].items()} == {0: 0.30, 1: 0.40, 2: 0.35}


def test_means_intervals_and_pairs_by_hand(tmp_path: Path) -> None:
    several = journeys(tmp_path)
    gold, wins, kl, paired, *there = tables(several, 1.84)
    assert gold.head == ("", "seed 0", "seed 1", "seed 2", "mean [95% over seeds]")
    # Mean 0.35, deviation 0.05, Student's t with two degrees 4.303: 4.303 * 0.05 / sqrt(3) = 0.1242.
    assert gold.rows[1] == ("PPO", "+0.300", "+0.400", "+0.350", "+0.350 [+0.226, +0.474]")
    assert gold.rows[0][0] == "best of 16"
    assert wins.rows[1] == ("PPO", "75.0%", "75.0%", "75.0%", "75.0%")  # all the same: no interval
    assert [row[0] for row in kl.rows] == ["PPO", "RLOO"]  # best-of-n has a bound only
    # PPO - RLOO: +0.02, -0.01, +0.05: mean 0.02, deviation 0.03, 4.303 * 0.03 / sqrt(3) = 0.0745.
    assert paired.rows[-1] == ("PPO less RLOO", "2 of 3", "+0.020 [\N{MINUS SIGN}0.055, +0.095]")
    assert "not widened for their number (3)" in paired.title
    assert there[0].title == "At 1.84 nats: gold gain"
    assert there[0].rows[1][:2] == ("PPO", "+0.46")  # a quarter of 1.84
    numbers = to_json(several, 1.84)
    assert numbers is not None
    assert numbers["exam"]["gold_difference"]["PPO"]["low"] == pytest.approx(0.35 - 0.12421, abs=1e-4)
    assert numbers["at_kl"]["gold_gain"]["RLOO"]["seeds"] == {0: 0.46, 1: 0.46, 2: 0.46}


def test_settings_tell_rivals_of_one_method_apart(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"s{seed}-{rate}", seed=seed, learning_rate=rate)
        for seed in (0, 1)
        for rate in (1e-3, 5e-4)
    ]
    several = groups(read_rivals(folders))
    assert [kind.label for kind in kinds(several)] == [
        "PPO (ppo.learning_rate 0.001)",
        "PPO (ppo.learning_rate 0.0005)",
    ]


def test_twice_the_same_is_pooled_with_nothing(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("again", 0), ("b", 1))]
    assert [kind.label for kind in kinds(groups(read_rivals(folders)))] == ["a", "again", "PPO"]


def test_no_table_where_more_than_the_seed_differs(tmp_path: Path) -> None:
    one = groups(read_rivals([make_run(tmp_path / "a")]))
    other = groups(read_rivals([make_run(tmp_path / "b"), make_run(tmp_path / "c", seed=1, max_new_tokens=64)]))
    for several in (one, other):
        assert not several_seeds(several)
        assert tables(several, 1.84) == []
        assert to_json(several, 1.84) is None


def test_one_seed_of_a_rival_has_no_mean(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1), make_run(tmp_path / "c", advantage="rloo")]
    gold, *_ = tables(groups(read_rivals(folders)), None)
    assert gold.rows[1] == ("RLOO", "+0.200", "–", "–")


def test_where_seeds_are_compared_is_where_all_would_be(tmp_path: Path) -> None:
    several = journeys(tmp_path)
    assert where(several, None) == 1.8351
    assert where(several, 1.0) == 1.0
    assert where([several[0], *groups(read_rivals([make_run(tmp_path / "x", seed=7, up_to=2)]))], None) is None
