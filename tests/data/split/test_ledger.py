"""What was assigned once is remembered, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackllama.data.split.assigning import LEDGER
from stackllama.data.split.ledger import locked_ledger, open_ledger, read_ledger, save_ledger
from stackllama.errors import DataError, RunError

Row = tuple[str, int, str]


def assigned(path: Path, *rows: Row) -> Path:
    columns = [list(column) for column in zip(*rows, strict=True)]
    pq.write_table(pa.table(columns, schema=LEDGER), path)
    return path


def known(path: Path) -> list[Row]:
    return [tuple(row.values()) for lot in read_ledger(path) for row in lot.to_pylist()]


def test_new_assignments_join_the_old_ones_in_order(tmp_path: Path) -> None:
    ledger = tmp_path / "deep" / "ledger.parquet"
    first = assigned(tmp_path / "1", ("t", 1, "eval"), ("s", 9, "sft"), ("s", 2, "ppo"))
    save_ledger(ledger, [first], folder=tmp_path)
    assert known(ledger) == [("s", 2, "ppo"), ("s", 9, "sft"), ("t", 1, "eval")]
    second = assigned(tmp_path / "2", ("s", 9, "sft"), ("s", 3, "judge"))
    save_ledger(ledger, [second], folder=tmp_path)
    assert known(ledger) == [("s", 2, "ppo"), ("s", 3, "judge"), ("s", 9, "sft"), ("t", 1, "eval")]


def test_the_same_assignments_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [("s", number, "sft") for number in range(1000)]
    one, other = (assigned(tmp_path / name, *some) for name, some in (("a", rows[:400]), ("b", rows[400:])))
    save_ledger(tmp_path / "x", [one, other], folder=tmp_path)
    save_ledger(tmp_path / "y", [other], folder=tmp_path)
    save_ledger(tmp_path / "y", [one], folder=tmp_path)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "x", "y"]


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    assert known(tmp_path / "absent") == []
    (tmp_path / "bad").write_text("not parquet")
    (tmp_path / "folder").mkdir()
    assigned(tmp_path / "unknown", ("s", 1, "test"))
    pq.write_table(pa.table({"site": ["s"]}), tmp_path / "other")
    cases = [
        ("bad", "no ledger"),
        ("folder", "is a folder"),
        ("unknown", "unknown splits: test"),
        ("other", "no ledger"),
    ]
    for name, message in cases:
        with pytest.raises(DataError, match=message):
            open_ledger(tmp_path / name)
    with pytest.raises(RunError, match=r"cannot be written.*data\.ledger"):
        open_ledger(tmp_path / "bad" / "ledger")
    with pytest.raises((DataError, RunError), match="ledger"):
        open_ledger(tmp_path / ("x" * 5000))


def test_opening_a_ledger_leaves_the_disk_as_it_was(tmp_path: Path) -> None:
    open_ledger(tmp_path / "deep" / "ledger")
    assert list(tmp_path.iterdir()) == []
    save_ledger(tmp_path / "ledger", [assigned(tmp_path / "1", ("s", 1, "sft"))], folder=tmp_path)
    content = (tmp_path / "ledger").read_bytes()
    open_ledger(tmp_path / "ledger")
    assert (tmp_path / "ledger").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "ledger"]


def test_a_question_in_two_splits_is_refused(tmp_path: Path) -> None:
    rows: list[Row] = [("s", 1, "sft"), ("s", 2, "eval"), ("s", 2, "sft"), ("t", 2, "eval")]
    torn = assigned(tmp_path / "torn", *rows)
    with pytest.raises(DataError, match=r"question 2 of s is in two splits by the ledger .*torn.*backup"):
        open_ledger(torn)
    for first in (1, 2):  # one of the two rows is in the ledger, the other one is new
        ledger = assigned(tmp_path / "ledger", rows[first])
        content = ledger.read_bytes()
        with pytest.raises(DataError, match="question 2 of s is in two splits"):
            save_ledger(ledger, [assigned(tmp_path / "new", rows[0], rows[3 - first], rows[3])], folder=tmp_path)
        assert ledger.read_bytes() == content


def test_rows_of_one_question_are_told_where_a_lot_ends_between_them(tmp_path: Path) -> None:
    rows: list[Row] = [("s", number, "sft") for number in range(1 << 18)]
    open_ledger(assigned(tmp_path / "whole", *rows))
    with pytest.raises(DataError, match=f"question {(1 << 18) - 1} of s is in two splits"):
        open_ledger(assigned(tmp_path / "torn", *rows, ("s", (1 << 18) - 1, "eval")))


def test_one_build_at_a_time_has_the_ledger(tmp_path: Path) -> None:
    ledger, alias = tmp_path / "deep" / "ledger", tmp_path / "alias"
    with locked_ledger(ledger):
        alias.symlink_to(ledger)
        for name in (ledger, alias):
            with pytest.raises(RunError, match=r"deep/ledger is in use by another process.*wait for it"):
                locked_ledger(name).__enter__()
    with locked_ledger(alias):
        pass
    assert list(ledger.parent.iterdir()) == []
