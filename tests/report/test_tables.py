from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.data.small_store import write

from stackllama.data.store.census import Census, take
from stackllama.data.store.opening import Opened
from stackllama.report import tables
from stackllama.report.tables import Table, lines

REPORT: dict[str, Any] = {
    "rows": 13,
    "dropped": {"post: empty Body": 2, "answer: its question is not there": 3},
    "pairs_dropped": {"pair: tied score": 1, "question: all answers tied": 4, "question: fewer than two answers": 9},
    "notes": {"questions judged by all votes": 2},
    "truncated": {"a.test": {"Posts": 0}},
    "clusters": {"clusters": 1, "questions in them": 2, "largest": 2, "links followed": 0},
    "baselines": [],
}


@pytest.fixture(scope="module")
def census(tmp_path_factory: pytest.TempPathFactory) -> Census:
    return take(write(tmp_path_factory.mktemp("store")))


def cells(table: Table) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in table.rows}


def test_what_was_left_out_adds_up(census: Census) -> None:
    posts, questions, pairs = (cells(table) for table in tables.left_out(REPORT, census))
    assert posts == {
        "questions": ("3",),
        "answers": ("5",),
        "post: empty Body": ("2",),
        "answer: its question is not there": ("3",),
        "together": (f"{REPORT['rows']}",),
    }
    assert questions == {
        "with a pair": ("2",),
        "fewer than two answers": ("1",),
        "two answers or more, but no pair": ("0",),
        "together": ("3",),
    }
    assert pairs == {"kept": ("3",), "tied score": ("1",), "together": ("4",)}


def test_without_a_report_only_the_questions_are_told(census: Census) -> None:
    assert [table.title for table in tables.left_out({}, census)] == ["Questions"]
    assert tables.remarks({}).rows == []


def test_remarks(census: Census) -> None:
    assert cells(tables.remarks(REPORT)) == {
        "a.test: Posts breaks off at byte": ("0",),
        "questions judged by all votes": ("2",),
        "question: all answers tied": ("4",),
        "clusters of several questions": ("1",),
        "clusters: questions in them, whether or not they were left out later": ("2",),
        "clusters: largest": ("2",),
    }


def test_in_short(census: Census) -> None:
    found = cells(tables.overview(Opened("x", "run", Path("x"), {}, rebuilt=False), census))
    assert found["sites"] == ("a.test, b.test",)
    assert found["questions with a pair"] == ("2 (66.7%)",)
    assert found["questions with an accepted answer"] == ("1 (33.3%)",)
    assert found["asked"] == ("2010-03-01 to 2011-05-01",)
    assert found["licences, by texts"] == ("CC BY-SA 2.5 (7), CC BY-SA 3.0 (1)",)
    assert cells(tables.splits(census)) == {"eval": ("1", "2", "1"), "sft": ("2", "3", "2"), "all": ("3", "5", "3")}
    assert cells(tables.content(census))["link"] == ("33.3%", "20.0%")
    assert cells(tables.quantiles(census))["length of an answer"] == (
        *("15.0", "8", "8", "10", "10", "17", "30", "30"),
    )


def test_notes_say_what_could_be_misread(census: Census) -> None:
    run = Opened("x", "run", Path("x"), REPORT, rebuilt=False)
    assert tables.notes(run, census) == []
    said = " ".join(tables.notes(replace(run, kind="preference data of another tool (paired)", rebuilt=True), census))
    assert "default recipe" in said
    assert "no votes" in said
    undated = replace(census, questions=replace(census.questions, first=""))
    said = " ".join(tables.notes(replace(run, report={}), undated))
    assert "Nobody kept" in said
    assert "No text has a date" in said


def test_baselines(census: Census) -> None:
    nothing = {"rules": "none", "questions": 0, "pairs": 0} | dict.fromkeys(
        ("longer_wins", "longer_error", "earlier_wins", "earlier_error")
    )
    rows = tables.baseline_rows({"baselines": [nothing]}, census)
    assert tables.baselines(rows).rows == [
        ("the pairs as they are here", "2", "3", "0.750 ± 0.177", "0.500 ± 0.354"),
        ("none", "0", "0", "-", "-"),
    ]


def test_a_table_in_a_terminal() -> None:
    numbers = Table("Numbers", ("what", "n"), [("a", "1,000"), ("long name", "7")])
    assert list(lines(numbers)) == ["Numbers", "  what           n", "  a          1,000", "  long name      7"]
    assert list(lines(Table("Words", (), [("a", "x"), ("bb", "7")]))) == ["Words", "  a   x", "  bb  7"]
    assert list(lines(Table("Counts", (), [("a", "1"), ("bb", "17")]))) == ["Counts", "  a    1", "  bb  17"]
    assert list(lines(Table("Nothing", (), []))) == ["Nothing"]
