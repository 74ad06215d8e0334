from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.split.assigning import SPLITS, Key, assign, decide
from stackllama.errors import DataError

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


class Remembered:
    """Splits over several dumps, as a build assigns them: clusters decided together, all others one by one."""

    def __init__(self) -> None:
        self.past: dict[Key, str] = {}
        self.dropped: set[Key] = set()

    def assign(self, keys: list[Key], clusters: dict[Key, Key]) -> dict[Key, str]:
        groups: dict[Key, list[Key]] = {}
        for key, of in clusters.items():
            if key in keys or key in self.past:
                groups.setdefault(of, []).append(key)
        decided = self.decide([sorted(group) for group in groups.values()])
        found = {key: decided[key] if key in decided else self.past.get(key) or assign(*key, FRACTIONS) for key in keys}
        self.dropped = {key for key, split in found.items() if split is None}
        splits = {key: split for key, split in found.items() if split is not None}
        self.past |= splits
        return splits

    def decide(self, groups: list[list[Key]]) -> dict[Key, str | None]:
        members = [key for group in groups for key in group]
        sites = sorted({site for site, _ in members})
        starts = np.cumsum([0, *map(len, groups)])[:-1]
        site = np.array([sites.index(name) for name, _ in members], np.int64)
        past = np.array([SPLITS.index(self.past[key]) if key in self.past else -1 for key in members], np.int64)
        ids = np.array([number for _, number in members], np.int64)
        found = decide(starts, sites, site, ids, past, FRACTIONS)
        return {key: (*SPLITS, None)[at] for key, at in zip(members, found.tolist(), strict=True)}


def test_a_cluster_is_never_divided() -> None:
    keys = [("s", number) for number in range(300)]
    clusters = {key: ("s", key[1] - key[1] % 3) for key in keys}
    found = Remembered().assign(keys, clusters)
    for number in range(0, 300, 3):
        assert len({found[("s", number + step)] for step in range(3)}) == 1
    assert len(found) == 300


def test_which_member_stands_for_a_cluster_does_not_matter() -> None:
    keys = [("s", number) for number in range(300)]
    by_first = {key: ("s", key[1] - key[1] % 3) for key in keys}
    by_last = {key: ("s", key[1] - key[1] % 3 + 2) for key in keys}
    assert Remembered().assign(keys, by_first) == Remembered().assign(keys[::-1], by_last)


def test_a_cluster_that_touches_eval_goes_to_eval_and_its_training_rows_are_dropped() -> None:
    held_out, trained, new = first_in("eval"), first_in("sft"), ("s", 50_000)
    past = Remembered()
    past.assign([held_out, trained], {})
    clusters = {held_out: held_out, trained: held_out, new: held_out}
    for _ in range(2):  # and so it stays
        assert past.assign([held_out, trained, new], clusters) == {held_out: "eval", new: "eval"}
        assert past.dropped == {trained}


def test_two_training_splits_do_not_share_a_cluster() -> None:
    a, b = sorted([first_in("sft"), first_in("reward")])
    past = Remembered()
    before = past.assign([a, b], {})
    assert past.assign([a, b], {a: a, b: a}) == {a: before[a]}
    assert past.dropped == {b}


def test_a_question_of_the_past_that_is_gone_still_holds_its_cluster() -> None:
    held_out, new = first_in("eval"), first_in("sft")
    past = Remembered()
    past.assign([held_out], {})
    assert past.assign([new], {new: held_out, held_out: held_out}) == {new: "eval"}


@given(st.lists(st.dictionaries(st.integers(0, 12), st.integers(0, 12), max_size=8), min_size=1, max_size=5))
def test_no_cluster_is_ever_in_two_splits(rounds: list[dict[int, int]]) -> None:
    past = Remembered()
    keys = [("s", number) for number in range(13)]
    for links in rounds:
        clusters = {("s", a): ("s", b) for a, b in links.items()}
        clusters |= {representative: representative for representative in clusters.values()}
        before = dict(past.past)
        found = past.assign(keys, clusters)
        assert set(found) | past.dropped == set(keys)
        assert not set(found) & past.dropped
        by_cluster: dict[Key, set[str]] = {}
        for key, split in found.items():
            by_cluster.setdefault(clusters.get(key, key), set()).add(split)
            assert before.get(key, split) == split
        assert all(len(splits) == 1 for splits in by_cluster.values())
