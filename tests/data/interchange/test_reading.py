from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackllama.data.interchange import reading as interchange_read
from stackllama.data.interchange.formats import SCHEMAS
from stackllama.data.interchange.reading import Piece, pieces, read, read_piece
from stackllama.errors import DataError
from tests.data.mutations.watching import measuring

LINKS = ["https://s.test/q/1", "https://s.test", ""]


def line(number: int, **more: Any) -> bytes:
    return json.dumps({"prompt": f"p{number}", "chosen": "yes", "rejected": "no"} | more).encode() + b"\n"


def paired(count: int) -> list[dict[str, Any]]:
    return [
        {
            "qid": number // 2,
            "question": f"question {number // 2}",
            "date": "2020/01/01",
            "metadata": LINKS,
            "response_j": f"good {number}",
            "response_k": "bad",
        }
        for number in range(count)
    ]


def parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **more)
    return path


def test_jsonl_is_cut_at_line_ends_and_every_line_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "set-00000-of-00002.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(line(number) for number in range(100)).rstrip())
    cut = pieces(path, piece_bytes=300)
    assert len(cut) > 10
    assert [piece.last for piece in cut[:-1]] == [piece.first for piece in cut[1:]]
    assert (cut[0].first, cut[-1].last) == (0, path.stat().st_size)
    content = path.read_bytes()
    assert all(content[piece.last - 1 : piece.last] == b"\n" for piece in cut[:-1])
    dropped: Counter[str] = Counter()
    found = [one.text for piece in pickle.loads(pickle.dumps(cut)) for one in read_piece(piece, dropped)]
    assert found == [f"p{number}" for number in range(100)]
    assert dropped == {}
    assert {piece.site for piece in cut} == {"set"}


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", paired(40), SCHEMAS["paired"], row_group_size=7)
    cut = pieces(path, piece_bytes=1)
    assert [(piece.first, piece.last) for piece in cut] == [(number, number + 1) for number in range(6)]
    assert [(piece.first, piece.last) for piece in pieces(path)] == [(0, 6)]
    questions, dropped = read(path)
    assert dropped == {}
    assert [(one.id, len(one.pairs)) for one in questions] == [(number, 2) for number in range(20)]


def test_a_folder_is_read_in_the_order_of_its_paths_without_the_attribution(tmp_path: Path) -> None:
    parquet(tmp_path / "b" / "x.parquet", paired(2))
    (tmp_path / "a.jsonl").write_bytes(line(1))
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for other in ("ATTRIBUTION.jsonl", "README.md", ".hidden.jsonl"):
        (tmp_path / other).write_text("not data")
    parquet(tmp_path / "none.parquet", [], SCHEMAS["jsonl"])
    assert [(Path(piece.path).name, piece.format) for piece in pieces(tmp_path)] == [
        ("a.jsonl", "jsonl"),
        ("x.parquet", "paired"),
    ]


def test_formats_are_known_by_their_columns_in_either_kind_of_file(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "score": 0.5}
    answers = [{"answer_id": 1, "pm_score": 2, "text": "a"}]
    scored = {"qid": 1, "question": "q", "answers": answers}
    (tmp_path / "p.jsonl").write_text(json.dumps(scored) + "\n")
    for path in (parquet(tmp_path / "j.parquet", [row]), parquet(tmp_path / "p.parquet", [scored])):
        assert len(read(path)[0]) == 1
    (one,), _ = read(tmp_path / "p.jsonl")
    assert (one.site, one.answers[0].votes) == ("p", 3)


def test_broken_lines_are_dropped_by_reason_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interchange_read, "MAX_LINE", 60_000)
    path = tmp_path / "x.jsonl"
    deep = b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"
    path.write_bytes(
        b'{"half": \n'
        + line(1)
        + deep
        + b"[" * 20000
        + b"\n"
        + b"3\n\n"
        + b'{"prompt": "\xff"}\n'
        + line(2, prompt="x" * 70_000)
        + line(3, chosen="\ud800")
        + b'{"prompt": "p", "chosen": "c", "rejected": 1'
        + b"0" * 5000
        + b"}\n"
        + line(4)
    )
    found, dropped = read(path)
    assert sorted(one.text for one in found) == ["p1", "p4"]
    assert dropped == {
        "row: JSON nested too deeply": 2,
        "row: broken JSON": 2,
        "row: chosen has half a character (a lone surrogate)": 1,
        "row: its line has over 60000 bytes": 1,
        "row: not UTF-8": 1,
        "row: not a JSON object": 1,
    }


def test_text_in_parquet_that_is_not_utf8_is_dropped(tmp_path: Path) -> None:
    good = pa.array(["a", "b", "c"])
    offsets = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"p\xff\xfeq")])
    table = pa.table({"prompt": broken, "chosen": good, "rejected": pa.array(["x", "y", "z"])})
    pq.write_table(table, tmp_path / "x.parquet")
    found, dropped = read(tmp_path / "x.parquet")
    assert sorted(one.text for one in found) == ["p", "q"]
    assert dropped == {"row: not UTF-8": 1}


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_columns_that_fit_no_format_are_named_with_those_that_would(tmp_path: Path, name: str) -> None:
    row = {"chosen": "c", "rejected": "r"}
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet(path, [row])
    else:
        path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as told:
        pieces(path)
    for word in (name, "'chosen', 'rejected'", "prompt, chosen, rejected", "response_k", "qid, question, answers"):
        assert word in str(told.value)


WRONG: list[dict[str, Any]] = [
    {"prompt": "p", "chosen": [{"role": "user", "content": "c"}], "rejected": "r"},
    {"prompt": 3, "chosen": "c", "rejected": "r"},
    {"qid": "one", "question": "q", "response_j": "j", "response_k": "k"},
    {"qid": 1, "question": "q", "response_j": "j", "response_k": "k", "metadata": "https://"},
    {"qid": 1, "question": "q", "answers": ["a"]},
    {"qid": 1, "question": "q", "answers": [{"text": "a", "answer_id": 1}]},
    {"qid": 1, "question": "q", "answers": [{"text": "a", "answer_id": 1, "pm_score": "high"}]},
    {"qid": 1, "question": "q", "answers": [{"text": "a", "answer_id": 1, "pm_score": 1, "more": {"a": 1}}]},
]


@pytest.mark.parametrize("row", WRONG)
def test_a_column_of_the_wrong_type_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"x\.parquet: the column '\w+' is .+, and has to be .+; convert it"):
        pieces(parquet(tmp_path / "x.parquet", [row]))
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    read(tmp_path / "x.jsonl")  # lines have no types: what does not fit is dropped


def test_other_widths_and_kinds_of_the_same_types_are_read(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(paired(2), SCHEMAS["paired"])
    for name, kind in (("qid", pa.int32()), ("question", pa.large_string()), ("metadata", pa.large_list(pa.string()))):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    table = table.set_column(4, "response_j", table["response_j"].dictionary_encode())
    pq.write_table(table, tmp_path / "x.parquet")
    (one,), dropped = read(tmp_path / "x.parquet")
    assert (one.site, len(one.pairs), dropped) == ("s.test", 2, {})


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet cannot be read: .+; give an intact file"):
        pieces(tmp_path)


def test_damage_inside_a_file_is_told_with_its_place(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", paired(4000), SCHEMAS["paired"], compression="zstd")
    content = bytearray(path.read_bytes())
    content[100:20000] = b"\x07" * 19900
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet, row groups 0 to 0, cannot be read"):
        read(path)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_piece(Piece(str(tmp_path / "gone.jsonl"), "jsonl", "s", 0, 9), Counter()))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there; give a file, a folder, or hub:OWNER/NAME"):
        pieces(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"has no file that ends in \.parquet or \.jsonl"):
        pieces(tmp_path)
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"ends in \.csv"):
        pieces(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").write_text('"just text"\n' * 3)
    with pytest.raises(DataError, match=r"x\.jsonl: its first line cannot be used \(row: not a JSON object\)"):
        pieces(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("where", "asked", "files"),
    [
        ("hub:own/set", ("own/set", None, ["*.parquet", "*.jsonl"]), ["a.jsonl", "b.jsonl"]),
        ("hub:own/set/data/ft", ("own/set", None, ["data/ft/*.parquet", "data/ft/*.jsonl"]), ["b.jsonl"]),
        ("hub:own/set/data@v1.0", ("own/set", "v1.0", ["data/*.parquet", "data/*.jsonl"]), ["b.jsonl"]),
        ("hub:own/set/a.jsonl", ("own/set", None, ["a.jsonl"]), ["a.jsonl"]),
    ],
)
def test_a_data_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, asked: tuple[Any, ...], files: list[str]
) -> None:
    (tmp_path / "data" / "ft").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_bytes(line(1))
    (tmp_path / "data" / "ft" / "b.jsonl").write_bytes(line(2))
    calls = []

    def download(*arguments: Any) -> Path:
        calls.append(arguments)
        return tmp_path

    monkeypatch.setattr(interchange_read, "download", download)
    assert [Path(piece.path).name for piece in pieces(where)] == files
    assert calls == [asked]


@pytest.mark.parametrize("where", ["hub:set", "hub:own/set/../../x", "hub:", "hub:own/set@", "hub:a/b c"])
def test_a_wrong_name_of_a_data_set_is_told(where: str) -> None:
    with pytest.raises(DataError, match="write hub:OWNER/NAME"):
        pieces(where)


def test_what_the_hub_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interchange_read, "download", lambda *_: tmp_path)
    with pytest.raises(DataError, match="the data set own/set has no data"):
        pieces("hub:own/set/data")


def test_offline_the_hubs_cache_is_read_and_a_missing_set_is_a_clear_error(tmp_path: Path) -> None:
    commit = "0" * 40
    cached = tmp_path / "hub" / "datasets--own--set"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "a.jsonl").write_bytes(line(1))
    code = (
        "from stackllama.data.interchange.reading import pieces, read\n"
        "from stackllama.errors import DataError\n"
        "print([one.text for one in read('hub:own/set')[0]])\n"
        "try:\n    pieces('hub:own/other')\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[:1] == ["['p1']"], done.stderr
    assert "hub:own/other cannot be had from the Hub" in done.stdout


def test_pipes_long_names_and_links_that_lead_out_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "private.jsonl").write_bytes(line(1))
    (folder / "a.jsonl").symlink_to("../private.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is a link that leads out of .*set, to .*/private\.jsonl; .*hub:"):
        pieces(folder)
    (tmp_path / "private.jsonl").rename(folder / "real.txt")
    (folder / "a.jsonl").unlink()
    (folder / "a.jsonl").symlink_to("real.txt")
    assert len(read(folder)[0]) == len(read(folder / "a.jsonl")[0]) == 1
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        pieces(tmp_path / ("n" * 300 + ".jsonl"))
    os.mkfifo(folder / "b.jsonl")
    told: list[str] = []

    def look() -> None:
        for where in (folder, folder / "b.jsonl"):
            try:
                pieces(where)
            except DataError as error:
                told.append(str(error))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(20)
    assert [("it is no file that can be opened" in one, "is not there" in one) for one in told] == [
        (True, False),
        (False, True),
    ]


def test_a_column_that_is_there_twice_is_told(tmp_path: Path) -> None:
    table = pa.table([["p"], ["c"], ["r"], ["p"]], names=["prompt", "chosen", "rejected", "prompt"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet has more than one column 'prompt'"):
        pieces(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")
def test_lines_that_swell_when_they_are_read_cost_little(tmp_path: Path) -> None:
    swelling = b'{"prompt": [' + b"[]," * 600_000 + b"[]]}\n"  # 1.8 MB, and 40 MB as lists
    (tmp_path / "x.jsonl").write_bytes(swelling * 4 + line(1) + b'{"prompt": "' + b"x" * 40_000_000 + b'"}\n')
    with measuring(60) as cost:
        (one,), dropped = read(tmp_path / "x.jsonl")
    assert one.text == "p1"
    assert dropped == {"row: prompt is not text": 4, "row: its line has over 8000000 bytes": 1}
    assert cost.megabytes < 110  # over 160, were four of them held at a time


def bomb(path: Path, text: str, *, rows: int, group: int) -> Path:
    """The same text in every row; it is stored once in each row group."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    names = pa.array([str(number) for number in range(rows)])
    table = pa.table({"prompt": names, "chosen": texts, "rejected": names})
    pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=group)
    return path


def test_parquet_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "x" * 50_000_000, "chosen": "c", "rejected": "r"}
    claims = parquet(tmp_path / "a.parquet", [row], compression="zstd")
    with pytest.raises(DataError, match=r"claims [0-9]{8,} bytes in [0-9]{4,5} packed ones; .* a decompression bomb"):
        pieces(claims)
    repeats = bomb(tmp_path / "b.parquet", "x" * 900_000, rows=20_000, group=20_000)
    with pytest.raises(DataError, match=r"has over [0-9]{8} bytes of text in [0-9]{6,7} stored ones; .* bomb"):
        read(repeats)


def test_a_text_in_many_rows_is_no_bomb(tmp_path: Path) -> None:
    found, dropped = read(bomb(tmp_path / "a.parquet", "x" * 2000, rows=3000, group=500))
    assert (len(found), dropped) == (3000, {})
