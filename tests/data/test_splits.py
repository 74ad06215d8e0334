from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.splits import SPLITS, Key, Ledger, assign
from stackllama.errors import DataError, RunError

FRACTIONS = {"sft": 0.4, "reward": 0.3, "judge": 0.1, "ppo": 0.1, "eval": 0.1}


def first_in(split: str, *, start: int = 1) -> Key:
    return next(("s", number) for number in range(start, 10_000) if assign("s", number, FRACTIONS) == split)


def test_shares_come_out() -> None:
    counts = Counter(assign("s", number, FRACTIONS) for number in range(20_000))
    for split, share in FRACTIONS.items():
        assert counts[split] == pytest.approx(20_000 * share, abs=300)  # 300 is over 4 deviations
    assert set(counts) == set(SPLITS)


def test_sites_are_independent_and_zero_shares_stay_empty() -> None:
    here = [assign("s", number, FRACTIONS) for number in range(200)]
    assert here != [assign("t", number, FRACTIONS) for number in range(200)]
    assert here == [assign("s", number, FRACTIONS) for number in range(200)]
    assert {assign("s", number, {"reward": 0.5, "eval": 0.5}) for number in range(200)} == {"reward", "eval"}
    assert {assign("s", number, {"ppo": 1.0}) for number in range(200)} == {"ppo"}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"sft": 0.5, "test": 0.5}, "no such split: test"),
        ({"sft": 0.5}, "add up to 1"),
        ({"sft": 1.5, "eval": -0.5}, "add up to 1"),
        ({}, "add up to 1"),
        ({"sft": float("nan"), "eval": 1.0}, "add up to 1"),
    ],
)
def test_fractions_must_be_shares(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        assign("s", 1, fractions)


def test_past_assignments_outlive_new_fractions(tmp_path: Path) -> None:
    keys = [("s", number) for number in range(100)]
    ledger = Ledger()
    first = ledger.assign(keys, fractions=FRACTIONS)
    assert first.splits == {key: assign(*key, FRACTIONS) for key in keys}
    ledger.save(tmp_path / "deep" / "ledger.parquet")
    again = Ledger.load(tmp_path / "deep" / "ledger.parquet")
    second = again.assign([*keys, ("s", 100)], fractions={"ppo": 1.0})
    assert second.splits == {**first.splits, ("s", 100): "ppo"}
    assert second.dropped == frozenset()


def test_saving_is_deterministic_and_leaves_nothing_behind(tmp_path: Path) -> None:
    keys = [("s", number) for number in range(50)] + [("a", 3)]
    paths = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for path, order in zip(paths, (keys, keys[::-1]), strict=True):
        ledger = Ledger()
        ledger.assign(order, fractions=FRACTIONS)
        ledger.save(path)
        ledger.save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    assert Ledger.load(tmp_path / "absent").past == {}
    (tmp_path / "bad").write_text("not parquet")
    with pytest.raises(DataError, match="no ledger"):
        Ledger.load(tmp_path / "bad")
    with pytest.raises(RunError, match="cannot be written"):
        Ledger().save(tmp_path / "bad" / "ledger")


def test_opening_a_ledger_leaves_the_disk_as_it_was(tmp_path: Path) -> None:
    assert Ledger.open(tmp_path / "ledger").past == {}
    assert list(tmp_path.iterdir()) == []
    ledger = Ledger()
    ledger.assign([("s", 1)], fractions=FRACTIONS)
    ledger.save(tmp_path / "ledger")
    content = (tmp_path / "ledger").read_bytes()
    assert Ledger.open(tmp_path / "ledger").past == ledger.past
    assert (tmp_path / "ledger").read_bytes() == content
    assert list(tmp_path.iterdir()) == [tmp_path / "ledger"]


def test_a_cluster_is_never_divided() -> None:
    keys = [("s", number) for number in range(300)]
    clusters = {key: ("s", key[1] - key[1] % 3) for key in keys}
    found = Ledger().assign(keys, clusters, fractions=FRACTIONS)
    for number in range(0, 300, 3):
        assert len({found.splits[("s", number + step)] for step in range(3)}) == 1
    assert found.dropped == frozenset()


def test_which_member_stands_for_a_cluster_does_not_matter() -> None:
    keys = [("s", number) for number in range(300)]
    by_first = {key: ("s", key[1] - key[1] % 3) for key in keys}
    by_last = {key: ("s", key[1] - key[1] % 3 + 2) for key in keys}
    first = Ledger().assign(keys, by_first, fractions=FRACTIONS)
    assert first == Ledger().assign(keys[::-1], by_last, fractions=FRACTIONS)


def test_a_cluster_that_touches_eval_goes_to_eval_and_its_training_rows_are_dropped() -> None:
    held_out, trained, new = first_in("eval"), first_in("sft"), ("s", 50_000)
    ledger = Ledger()
    ledger.assign([held_out, trained], fractions=FRACTIONS)
    clusters = {held_out: held_out, trained: held_out, new: held_out}
    for _ in range(2):  # and so it stays
        found = ledger.assign([held_out, trained, new], clusters, fractions=FRACTIONS)
        assert found.splits == {held_out: "eval", new: "eval"}
        assert found.dropped == {trained}


def test_two_training_splits_do_not_share_a_cluster() -> None:
    a, b = sorted([first_in("sft"), first_in("reward")])
    ledger = Ledger()
    past = ledger.assign([a, b], fractions=FRACTIONS).splits
    found = ledger.assign([a, b], {a: a, b: a}, fractions=FRACTIONS)
    assert found.splits == {a: past[a]}
    assert found.dropped == {b}


def test_a_question_of_the_past_that_is_gone_still_holds_its_cluster() -> None:
    held_out, new = first_in("eval"), first_in("sft")
    ledger = Ledger()
    ledger.assign([held_out], fractions=FRACTIONS)
    found = ledger.assign([new], {new: held_out, held_out: held_out}, fractions=FRACTIONS)
    assert found.splits == {new: "eval"}


@given(st.lists(st.dictionaries(st.integers(0, 12), st.integers(0, 12), max_size=8), min_size=1, max_size=5))
def test_no_cluster_is_ever_in_two_splits(rounds: list[dict[int, int]]) -> None:
    ledger = Ledger()
    keys = [("s", number) for number in range(13)]
    for links in rounds:
        clusters = {("s", a): ("s", b) for a, b in links.items()}
        clusters |= {representative: representative for representative in clusters.values()}
        before = dict(ledger.past)
        found = ledger.assign(keys, clusters, fractions=FRACTIONS)
        assert set(found.splits) | found.dropped == set(keys)
        assert not set(found.splits) & found.dropped
        by_cluster: dict[Key, set[str]] = {}
        for key, split in found.splits.items():
            by_cluster.setdefault(clusters.get(key, key), set()).add(split)
            assert before.get(key, split) == split
        assert all(len(splits) == 1 for splits in by_cluster.values())
