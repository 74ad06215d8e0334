from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from stackllama.data.interchange import writing as interchange_write
from stackllama.data.interchange.formats import ATTRIBUTION, SCHEMAS
from stackllama.data.interchange.writing import write
from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.data.store import store
from stackllama.errors import DataError, RunError

DAY = "2012-03-04T05:06:07.000"
ADA = Attribution("https://s.test/a/11", "Ada", 1, "https://s.test/users/1", "CC BY-SA 3.0")
BOB = Attribution("https://s.test/a/12", "anonymous", None, None, "CC BY-SA 4.0")
ASKER = Attribution("https://s.test/q/10", "Cy", 3, "https://s.test/users/3", "CC BY-SA 3.0")


def asked(number: int, *, pairs: tuple[Pair, ...] = (Pair(1, 0, 2),), site: str = "s.test") -> Question:
    answers = (
        Answer(11, "worse \U0001f37a", 0, False, DAY, ADA),
        Answer(12, "better\u2028", 3, False, DAY, BOB),
        Answer(13, "unpaired", -4, True, DAY, ADA),
    )
    return Question(site, number, "Title", "Body", ("t",), 1, DAY, ASKER, answers, pairs)


def render(title: str, body: str) -> str:
    return f"Q: {title} {body} A:"


def put(folder: Path, questions: list[Question], split: str = "sft") -> Path:
    store.write_questions(folder, split, questions)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_row_of_preferences(tmp_path: Path) -> None:
    export = write(put(tmp_path / "store", [asked(10, pairs=())]), tmp_path / "out", format="preferences")
    table = pq.read_table(tmp_path / "out" / "data" / "sft-00000.parquet")
    assert table.schema.equals(SCHEMAS["preferences"])
    assert pq.ParquetFile(tmp_path / "out/data/sft-00000.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    (row,) = table.to_pylist()
    assert (row["qid"], row["question"], row["date"]) == (10, "Body", "2012/03/04")
    assert row["metadata"] == ["https://s.test/q/10", "https://s.test", "https://s.test/users/3"]
    assert row["answers"][1] == {
        "answer_id": 12,
        "author": "anonymous",
        "author_id": None,
        "author_profile": None,
        "pm_score": 2,  # log2(1 + 3)
        "selected": False,
        "text": "better\u2028",
    }
    assert (row["answers"][2]["pm_score"], row["answers"][2]["selected"]) == (-1, True)
    assert export.rows == {"sft": 1}
    assert export.counts == {"answers": 3, "pairs": 0, "questions": 1}


def test_a_row_of_paired(tmp_path: Path) -> None:
    export = write(put(tmp_path / "store", [asked(10), asked(9, pairs=())]), tmp_path / "out", format="paired")
    table = pq.read_table(tmp_path / "out" / "data" / "sft-00000.parquet")
    assert table.schema.equals(SCHEMAS["paired"])
    (row,) = table.to_pylist()
    assert (row["response_j"], row["response_k"]) == ("better\u2028", "worse \U0001f37a")
    assert export.counts == {"answers": 2, "pairs": 1, "question: no pair": 1, "questions": 1}


def test_a_line_of_jsonl_is_plain_json(tmp_path: Path) -> None:
    write(put(tmp_path / "store", [asked(10)]), tmp_path / "out", format="jsonl", render=render)
    assert lines(tmp_path / "out" / "data" / "sft-00000.jsonl") == [
        {"prompt": "Q: Title Body A:", "chosen": " better\u2028", "rejected": " worse \U0001f37a"}
    ]


@pytest.mark.parametrize("form", ["preferences", "paired", "jsonl"])
def test_every_text_is_attributed(tmp_path: Path, form: str) -> None:
    two = (Pair(1, 0, 2), Pair(1, 2, 3))
    questions = [asked(10, pairs=two), asked(20, pairs=()), asked(30, pairs=two)]
    write(put(tmp_path / "store", questions), tmp_path / "out", format=form, render=render)
    noted = lines(tmp_path / "out" / ATTRIBUTION)
    assert [one["id"] for one in noted] == ([10, 20, 30] if form == "preferences" else [10, 30])
    assert [one["row"] for one in noted] == ([0, 1, 2] if form == "preferences" else [0, 2])
    first = noted[0]
    assert (first["split"], first["site"], first["title"]) == ("sft", "s.test", "Title")
    assert (first["url"], first["author"], first["license"]) == ("https://s.test/q/10", "Cy", "CC BY-SA 3.0")
    assert first["answers"][1] == {
        "id": 12,
        "url": "https://s.test/a/12",
        "author": "anonymous",
        "profile_url": None,
        "license": "CC BY-SA 4.0",
    }
    assert first.get("pairs") == (None if form == "preferences" else [[12, 11], [12, 13]])


def test_the_card_names_the_files_of_each_split_and_the_licences(tmp_path: Path) -> None:
    put(tmp_path / "store", [asked(10)], "sft")
    put(tmp_path / "store", [], "eval")
    export = write(tmp_path / "store", tmp_path / "out", format="paired")
    assert export.rows == {"eval": 0, "sft": 1}
    card = (tmp_path / "out" / "README.md").read_text()
    data_files = yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"]
    found = {one["split"]: [path.name for path in (tmp_path / "out").glob(one["path"])] for one in data_files}
    assert found == {"sft": ["sft-00000.parquet"], "eval": ["eval-00000.parquet"]}
    assert "| CC BY-SA 3.0 | 2 |" in card  # the question and the worse answer
    assert "| CC BY-SA 4.0 | 1 |" in card


@pytest.mark.parametrize("form", ["preferences", "paired", "jsonl"])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_same_store_gives_the_same_bytes_in_files_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, fixed: bool
) -> None:
    monkeypatch.setattr(interchange_write, "ROWS_PER_FILE", 4)
    monkeypatch.setattr(interchange_write, "ROWS_PER_GROUP", 3)
    put(tmp_path / "store", [asked(number) for number in range(5)])
    for name in ("a", "b"):
        write(tmp_path / "store", tmp_path / name, format=form, render=render, fixed_order=fixed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a" / "data").iterdir())) > 1


@pytest.mark.parametrize("run", [1, 2, 100])
def test_fixed_order_is_by_site_and_id_however_it_is_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int
) -> None:
    monkeypatch.setattr(interchange_write, "QUESTIONS_PER_RUN", run)
    monkeypatch.setattr(interchange_write, "RUNS_AT_ONCE", 2)
    order = [("b", 3), ("a", 7), ("b", 1), ("a", 12), ("a", 8)]
    put(tmp_path / "store", [asked(number, site=site, pairs=()) for site, number in order])
    write(tmp_path / "store", tmp_path / "out", format="preferences", fixed_order=True)
    rows = pq.read_table(tmp_path / "out" / "data" / "sft-00000.parquet").to_pylist()
    assert [(row["metadata"][1], row["qid"]) for row in rows] == [
        ("https://a", 7),
        ("https://a", 8),
        ("https://a", 12),
        ("https://b", 1),
        ("https://b", 3),
    ]
    assert [one["row"] for one in lines(tmp_path / "out" / ATTRIBUTION)] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [ATTRIBUTION, "README.md", "data"]


def test_fixed_order_makes_its_own_pairs_and_wants_two_answers(tmp_path: Path) -> None:
    lone = Question("s.test", 5, "t", "lone", (), 0, DAY, ASKER, asked(1).answers[:1])
    put(tmp_path / "store", [asked(10, pairs=(Pair(1, 0, 2),)), lone])
    export = write(tmp_path / "store", tmp_path / "out", format="paired", fixed_order=True)
    rows = pq.read_table(tmp_path / "out" / "data" / "sft-00000.parquet").to_pylist()
    # scores 0, 2, -1: the second beats the first, the first beats the third, the second beats the third
    assert [(row["response_j"][:4], row["response_k"][:4]) for row in rows] == [
        ("bett", "wors"),
        ("wors", "unpa"),
        ("bett", "unpa"),
    ]
    assert export.counts["question: fewer than two answers"] == 1


def test_what_cannot_be_written_is_told_and_changes_nothing(tmp_path: Path) -> None:
    folder = put(tmp_path / "store", [asked(10)])
    write(folder, tmp_path / "out", format="paired")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match="the formats are preferences, paired, jsonl"):
        write(folder, tmp_path / "out", format="csv")
    with pytest.raises(DataError, match="needs a template"):
        write(folder, tmp_path / "out", format="jsonl")
    with pytest.raises(DataError, match="no questions in the split 'evil'"):
        write(folder, tmp_path / "out", format="paired", splits=["sft", "evil"])
    with pytest.raises(DataError, match="build the data first"):
        write(tmp_path / "nothing", tmp_path / "out", format="paired")
    assert contents(tmp_path / "out") == before
    with pytest.raises(RunError, match="no export that could be replaced"):
        write(folder, folder, format="paired")
    assert store.read_questions(folder, "sft") == [asked(10)]
    write(folder, tmp_path / "out", format="preferences", splits=["sft"])
    assert (tmp_path / "out" / "data" / "sft-00000.parquet").is_file()


def test_an_export_is_replaced_by_one_of_another_format_and_other_splits(tmp_path: Path) -> None:
    folder = put(put(tmp_path / "store", [asked(10)]), [asked(20)], "eval")
    for form, splits in (("jsonl", None), ("paired", ["sft"]), ("preferences", ["eval"]), ("jsonl", [])):
        write(folder, tmp_path / "out", format=form, splits=splits, render=render)
    assert list(contents(tmp_path / "out")) == [ATTRIBUTION, "README.md"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "data/train-00000.jsonl", "data/sft-00000.parquet", "data/sft.jsonl", "models/x", ".git/HEAD"]
)
def test_a_file_beside_an_export_is_not_lost(tmp_path: Path, name: str) -> None:
    folder = put(tmp_path / "store", [asked(10)])
    write(folder, tmp_path / "out", format="jsonl", render=render)
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(RunError, match="no export that could be replaced, or holds something else as well"):
        write(folder, tmp_path / "out", format="jsonl", render=render)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", ["", "My notes", "{}\nMy notes\n", "My notes\n{}"])
def test_a_card_that_somebody_wrote_is_not_lost(tmp_path: Path, change: str) -> None:
    folder = put(tmp_path / "store", [asked(10)])
    write(folder, tmp_path / "out", format="paired")
    card = tmp_path / "out" / "README.md"
    card.write_text(change.format(card.read_text()))
    before = contents(tmp_path)
    with pytest.raises(RunError, match="no export that could be replaced"):
        write(folder, tmp_path / "out", format="paired")
    assert contents(tmp_path) == before


def test_a_name_that_no_folder_can_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="x cannot be written: File name too long; choose another folder"):
        write(put(tmp_path / "store", [asked(10)]), tmp_path / ("x" * 300), format="paired")
