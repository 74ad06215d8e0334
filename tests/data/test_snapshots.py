"""Later dumps of a site: five snapshots of a real one, cut by date, built one after the other with one ledger."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from stackllama.data.building import build
from stackllama.data.building.build import Machine, Settings
from stackllama.data.dump.rows import rows
from stackllama.data.pairs.rules import PairRules
from stackllama.data.posts import Question
from stackllama.data.split.assigning import EVAL, SPLITS
from stackllama.data.split.clusters import Clustering
from stackllama.data.split.ledger import read_ledger
from stackllama.data.store import store
from tests.data.dumps import shared_dumps, table

DAYS = ("2016-08-10", "2016-09-15", "2017-01-01", "2017-06-01", "9999")
SETTINGS = Settings(
    {"sft": 0.3, "reward": 0.35, "judge": 0.15, "ppo": 0.1, "eval": 0.1},
    PairRules(time="since_later"),
    clustering=Clustering(near_copies=True, links="all"),
)
Splits = dict[int, str]


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A site as it was on five days; in the later ones some questions have become links of others."""
    real = shared_dumps() / "ai-2017"
    folder = tmp_path_factory.mktemp("snapshots")
    for day in DAYS:
        (folder / day).mkdir()
        for name in ("Posts", "Votes", "PostLinks"):
            with (real / f"{name}.xml").open("rb") as stream:
                there = [row for row in rows(stream, table=name) if row["CreationDate"][:10] < day]
            (folder / day / f"{name}.xml").write_bytes(table(name, there))
    return [folder / day for day in DAYS]


@pytest.fixture(scope="module")
def built(snapshots: list[Path]) -> list[dict[str, list[Question]]]:
    """For each snapshot the questions of every split."""
    found = []
    ledger = snapshots[0].parent / "ledger.parquet"
    for snapshot in snapshots:
        out = snapshot / "out"
        sources = build.sources([snapshot], "ai.stackexchange.com")
        counts = build.build(sources, out, SETTINGS, Machine(), ledger=ledger, fingerprint=0)
        parts = store.read_manifest(out).parts
        found.append({s: store.read_questions(out, s) for s in SPLITS if f"questions/{s}" in parts})
        lost = counts["dropped"].get("question: its cluster belongs to another split", 0)
        assert lost == counts["clusters"]["questions that stay out for their past"]
    return found


def splits(snapshot: dict[str, list[Question]]) -> Splits:
    return {question.id: split for split, questions in snapshot.items() for question in questions}


@pytest.mark.dumps
def test_each_snapshot_grows(built: list[dict[str, list[Question]]]) -> None:
    sizes = [len(splits(snapshot)) for snapshot in built]
    assert sizes == sorted(sizes)
    assert sizes[0] > 50
    assert sizes[-1] > 3 * sizes[0]


@pytest.mark.dumps
def test_no_question_ever_changes_its_split_but_to_leave(built: list[dict[str, list[Question]]]) -> None:
    left = 0
    for earlier, later in zip(map(splits, built), map(splits, built[1:]), strict=False):
        for question, split in earlier.items():
            assert later.get(question, split) == split
            left += question not in later
    assert left > 0  # links that came later did tie questions of two splits


@pytest.mark.dumps
def test_what_was_held_out_is_held_out_for_good(built: list[dict[str, list[Question]]]) -> None:
    held_out: set[int] = set()
    for snapshot in built:
        of_eval = {question.id for question in snapshot[EVAL]}
        assert held_out <= of_eval
        held_out = of_eval


@pytest.mark.dumps
def test_a_cluster_is_in_one_split_and_links_are_inside_clusters(
    built: list[dict[str, list[Question]]], snapshots: list[Path]
) -> None:
    for snapshot, folder in zip(built, snapshots, strict=True):
        where = defaultdict(set)
        cluster = {}
        for split, questions in snapshot.items():
            for question in questions:
                where[question.cluster].add(split)
                cluster[question.id] = question.cluster
        assert all(len(there) == 1 for there in where.values())
        with (folder / "PostLinks.xml").open("rb") as stream:
            ends = [(int(row["PostId"]), int(row["RelatedPostId"])) for row in rows(stream, table="PostLinks")]
        tied = [(one, other) for one, other in ends if one in cluster and other in cluster]
        assert all(cluster[one] == cluster[other] for one, other in tied)
    assert len(tied) > 50


@pytest.mark.dumps
def test_no_training_question_of_any_snapshot_is_tied_to_a_held_out_one_of_a_later(
    built: list[dict[str, list[Question]]],
) -> None:
    last = built[-1]
    of_eval = {question.cluster for question in last[EVAL]}
    trained = [question for split, questions in last.items() if split != EVAL for question in questions]
    assert not of_eval & {question.cluster for question in trained}


@pytest.mark.dumps
def test_the_ledger_knows_every_question_that_was_ever_given_a_split(
    built: list[dict[str, list[Question]]], snapshots: list[Path]
) -> None:
    known = {
        row["id"]: row["split"]
        for lot in read_ledger(snapshots[0].parent / "ledger.parquet")
        for row in lot.to_pylist()
    }
    for snapshot in built:
        assert splits(snapshot).items() <= known.items()
