"""From dumps to the store: each question once, in one split, and every number accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackllama.data import build, store
from stackllama.data.posts import read_questions
from stackllama.data.synthetic import SITE, world_documents, write_dump
from stackllama.errors import DataError, RunError

FRACTIONS = {"sft": 0.4, "reward": 0.3, "judge": 0.0, "ppo": 0.1, "eval": 0.2}


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump") / "site"
    write_dump(folder, questions=150, seed=0, fractions=FRACTIONS)
    return folder


def test_a_dump_given_twice_is_counted_and_used_once(dump: Path) -> None:
    once, first = build.gather([read_questions(dump, site=SITE)])
    twice, both = build.gather(read_questions(dump, site=SITE) for _ in range(2))
    assert twice == once
    assert both["rows"] == 2 * first["rows"]
    assert both["dropped"]["question: its site and Id were read before"] == 150


def test_every_question_is_in_exactly_one_split_and_again_in_the_same(dump: Path, tmp_path: Path) -> None:
    questions, _ = build.gather([read_questions(dump, site=SITE)])
    ledger = tmp_path / "ledger.parquet"
    found = []
    for name in ("one", "two"):
        dropped = build.write_splits(tmp_path / name, questions, fractions=FRACTIONS, max_pairs=2, ledger=ledger)
        assert all(count > 0 for count in dropped.values())
        assert not any("kept" in reason for reason in dropped)
        found.append(
            {split: [q.id for q in store.read_questions(tmp_path / name, split)] for split in build.wanted(FRACTIONS)}
        )
    assert found[0] == found[1]
    assert sorted(number for numbers in found[0].values() for number in numbers) == sorted(q.id for q in questions)
    assert "judge" not in found[0]


def test_a_ledger_that_cannot_be_kept_is_told_before_anything_is_written(dump: Path, tmp_path: Path) -> None:
    questions, _ = build.gather([read_questions(dump, site=SITE)])
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    cases = [
        (tmp_path / "folder", DataError, "is a folder"),
        (tmp_path / "file" / "x.parquet", RunError, "cannot be written"),
        (tmp_path / ("x" * 5000), DataError, "no ledger"),
    ]
    for ledger, kind, message in cases:
        with pytest.raises(kind, match=message):
            build.write_splits(tmp_path / "store", questions, fractions=FRACTIONS, max_pairs=2, ledger=ledger)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_documents_are_shared_out_without_loss(tmp_path: Path) -> None:
    build.write_documents(tmp_path, world_documents(200, 0), fractions={"sft": 0.9, "eval": 0.1})
    numbers = [one.id for split in ("sft", "eval") for one in store.read_documents(tmp_path, split)]
    assert sorted(numbers) == list(range(1, 201))
