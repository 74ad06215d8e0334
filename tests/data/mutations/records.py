"""Preference data of other tools, and what can be wrong with it: values, keys, lines, types, columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stackllama.data.interchange.formats import SCHEMAS
from stackllama.data.split.assigning import LEDGER, SPLITS
from tests.data.mutations.bodies import body, text

Record = dict[str, Any]
FORMATS = ("preferences", "paired", "jsonl")


def records(rng: Random) -> list[Record]:
    """A dozen rows of one of the three formats."""
    form = rng.choice(FORMATS)
    if form == "preferences":
        return [_scored(number) for number in range(12)]
    if form == "paired":
        return [{**_head(number // 2), "response_j": f"good {number}", "response_k": "bad"} for number in range(12)]
    return [
        {"prompt": f"Question: {number // 2}?\n\nAnswer:", "chosen": f"yes {number}", "rejected": "no"}
        for number in range(12)
    ]


def _head(number: int) -> Record:
    address = "https://beer.stackexchange.com"
    return {
        "qid": number,
        "question": f"<p>Why is {number}?</p>" if number % 2 else f"Why is {number}?",
        "date": f"2019/05/{number + 1:02}",
        "metadata": [f"{address}/questions/{number}", address, f"{address}/users/7/"],
    }


def _scored(number: int) -> Record:
    answers = [
        {
            "answer_id": 100 * number + n,
            "author": "Ada",
            "author_id": 7,
            "author_profile": "https://beer.stackexchange.com/users/7/",
            "pm_score": n,
            "selected": n == 2,
            "text": f"Because {n}, said {number}.",
        }
        for n in range(number % 4)
    ]
    return {**_head(number), "answers": answers}


def value(rng: Random) -> Any:
    """Anything that JSON has, and some of what it has not."""
    plain = (
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**53 + 1,
        2**63 - 1,
        2**63,
        -(2**63),
        -(2**63) - 1,
        10**30,
        1.0,
        -0.5,
        1e308,
    )
    odd: tuple[Any, ...] = (
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        [],
        {},
        [[]],
        {"": ""},
        ["a", None, 3],
        "1",
        "true",
        "2019-05-01",
    )
    return rng.choice((*plain, *odd, text(rng), text(rng), body(rng), "x" * 1_000_001 if rng.random() < 0.02 else "x"))


def _inside(rng: Random, record: Record) -> Record:
    """The record, or one of its answers."""
    answers = record.get("answers")
    inner = [one for one in answers if isinstance(one, dict)] if isinstance(answers, list) else []
    return rng.choice(inner) if inner and rng.random() < 0.6 else record


def bad_values(rng: Random, some: list[Record]) -> None:
    for _ in range(rng.choice((1, 1, 4))):
        one = _inside(rng, rng.choice(some))
        one[rng.choice(sorted(one) or ["qid"])] = value(rng)


def bad_column(rng: Random, some: list[Record]) -> None:
    name, given = rng.choice(sorted(some[0]) or ["qid"]), value(rng)
    for one in some:
        one[name] = given


def missing_keys(rng: Random, some: list[Record]) -> None:
    for _ in range(rng.choice((1, 3))):
        one = _inside(rng, rng.choice(some))
        one.pop(rng.choice(sorted(one) or ["qid"]), None)


def missing_column(rng: Random, some: list[Record]) -> None:
    name = rng.choice(sorted(some[0]) or ["qid"])
    for one in some:
        one.pop(name, None)


def more_keys(rng: Random, some: list[Record]) -> None:
    for one in some:
        _inside(rng, one)[
            rng.choice(("pairs", "site", "id", "prompt", "chosen", "rejected", "question", "answers", text(rng)))
        ] = value(rng)


def repeated(rng: Random, some: list[Record]) -> None:
    for _ in range(rng.choice((1, 10))):
        some.insert(rng.randint(0, len(some)), json.loads(json.dumps(rng.choice(some))))


def one_id(rng: Random, some: list[Record]) -> None:
    for one in some:
        one["qid"] = rng.choice((5, 5, -5, 0))
        for answer in one["answers"] if isinstance(one.get("answers"), list) else ():
            if isinstance(answer, dict):
                answer["answer_id"] = rng.choice((5, 5, 6, 7))


def against_each_other(rng: Random, some: list[Record]) -> None:
    """Pairs in circles: each side is once better and once worse."""
    sides = [("chosen", "rejected"), ("response_j", "response_k")]
    for one in some:
        for better, worse in sides:
            if better in one and worse in one:
                one[better], one[worse] = rng.sample(("a", "b", "c", "d"), 2)
        if "prompt" in one:
            one["prompt"] = "p"


def other_sites(rng: Random, some: list[Record]) -> None:
    hosts = (
        "a.test",
        "../..",
        "%2e%2e%2f",
        "ü.test",
        "",
        "x" * 260,
        "a:b@c",
        "[::1]",
        "a\x00b",
        "%ff%fe",
        "A.TEST",
        "a.test.",
        "%00",
        "\ud800",
    )
    for one in some:
        if isinstance(one.get("metadata"), list):
            host = rng.choice(hosts)
            one["metadata"] = [
                rng.choice(("https://", "http://", "ftp://", "")) + host + rng.choice(("", "/q/1", "/../.."))
            ] * rng.choice((0, 1, 2, 3, 9))


def scores(rng: Random, some: list[Record]) -> None:
    for one in some:
        for answer in one["answers"] if isinstance(one.get("answers"), list) else ():
            if isinstance(answer, dict):
                answer["pm_score"] = rng.choice((-2, -1, 0, 1, 61, 62, 63, 64, 10**18))
                answer["selected"] = rng.random() < 0.5


def very_long(rng: Random, some: list[Record]) -> None:
    one = _inside(rng, rng.choice(some))
    one[rng.choice(sorted(one) or ["qid"])] = rng.choice(
        (
            *("x" * 900_000, "👍" * 900_000, "<" * 900_000, "x" * 40_000_000, [{}] * 2_000_000, [[]] * 9_000_000),
            *(
                [{"answer_id": n, "pm_score": n % 5, "text": str(n)} for n in range(3000)],
                {str(n): n for n in range(100_000)},
            ),
            *("<blockquote>" * 39 + "a\n" * 300_000, "<p>" + "<" * 900_000),
        )
    )


def very_many(rng: Random, some: list[Record]) -> None:
    """So many rows that whatever is slower than linear shows: of many questions, of one, of many sites."""
    first, kind = json.loads(json.dumps(some)), rng.choice(("questions", "one", "sites"))
    for number in range(rng.choice((3000, 12_000))):
        one = dict(first[number % len(first)])
        one |= {"qid": number, "prompt": f"p{number}"} if kind != "one" else {"qid": 1, "prompt": "p"}
        one |= {"metadata": [f"https://s{number}.test/q/1"]} if kind == "sites" else {}
        one |= {name: f"{number}" for name in ("chosen", "response_j") if name in one}
        some.append(one)


def bomb(rng: Random, path: Path) -> None:
    """Parquet with one text in very many rows, which stores it once; or with one that packs to nearly nothing."""
    count = rng.choice((300, 20_000))
    long = pa.array([rng.choice(("x", "a b ", "👍")) * rng.choice((1000, 200_000))])
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), long)
    if rng.random() < 0.3:
        count, texts = 2, pa.array(["x" * 100_000_000, "y"])
    names = pa.array([str(number) for number in range(count)])
    table = pa.table({"prompt": rng.choice((names, texts)), "chosen": texts, "rejected": names})
    pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=rng.choice((100, 100_000)))


RECORDS: dict[str, Callable[[Random, list[Record]], None]] = {
    one.__name__: one
    for one in (
        *(bad_values, bad_column, missing_keys, missing_column, more_keys, repeated, one_id, against_each_other),
        *(other_sites, scores),
    )
}
HUGE_RECORDS: dict[str, Callable[[Random, list[Record]], None]] = {"very_long": very_long, "very_many": very_many}


def as_lines(rng: Random, some: list[Record]) -> bytes:
    """JSONL, with a line here and there that is none."""
    ascii_only = rng.random() < 0.5
    lines = [json.dumps(one, ensure_ascii=ascii_only) for one in some]
    content = [line.encode("utf-8", "surrogatepass") for line in lines]
    if rng.random() < 0.3:
        odd: tuple[Any, ...] = (
            *(
                b"",
                b"{",
                b"}",
                b"null",
                b"3",
                b'"x"',
                b"[]",
                b"{}",
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"{}" * 2,
                b"\xff",
                b"\0",
            ),
            *(
                b'{"qid": 1' + b"0" * 5000 + b"}",
                b'{"prompt": "\\ud800"}',
                b"NaN",
                b"\xef\xbb\xbf{}",
                b"'",
                b"//x",
                b'{"a": 1,}',
            ),
        )
        content.insert(rng.randint(0, len(content)), rng.choice(odd))
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n")).join(content) + rng.choice((b"\n", b""))


def as_parquet(rng: Random, some: list[Record], path: Path) -> None:
    """Parquet in the schema of the format where the values fit, else whatever pyarrow makes of them."""
    columns = {name: [one.get(name) for one in some] for name in {name: None for one in some for name in one}}
    form = next((name for name in FORMATS if columns.keys() <= set(SCHEMAS[name].names)), None)
    arrays = {
        name: _array(values, SCHEMAS[form].field(name).type if form else None) for name, values in columns.items()
    }
    table = pa.table({_printable(name): array for name, array in arrays.items()} or {"none": pa.nulls(len(some))})
    if rng.random() < 0.2:
        table = _changed(rng, table)
    how = {
        "compression": rng.choice(("zstd", "snappy", "none", "gzip", "lz4")),
        "row_group_size": rng.choice((1, 5, 1000)),
        "use_dictionary": rng.random() < 0.5,
        "data_page_version": rng.choice(("1.0", "2.0")),
        "write_statistics": rng.random() < 0.5,
        "store_schema": rng.random() < 0.8,
        "write_page_checksum": rng.random() < 0.2,
    }
    try:
        pq.write_table(table, path, **how)
    except pa.ArrowException:  # a type that Parquet has not, such as a record without any field
        pq.write_table(
            pa.table({_printable(name): [*map(_printable, values)] for name, values in columns.items()}), path
        )


def ledger(rng: Random) -> bytes:
    """A ledger that has some questions already, perhaps in a split that there is none of, or of other columns."""
    schema = rng.choice((LEDGER, LEDGER, LEDGER.remove(1), LEDGER.set(1, pa.field("id", pa.string()))))
    rows = [
        {
            "site": rng.choice(("embedded.test", "given", "beer.stackexchange.com")),
            "id": number,
            "split": rng.choice((*SPLITS, "x")),
        }
        for number in (10, 20, 30, 1, 2)
    ]
    table = pa.Table.from_pylist(
        [
            {**row, "id": str(row["id"])} if schema.names[1] == "id" and schema[1].type == pa.string() else row
            for row in rows
        ],
        schema,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def _printable(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()


def _array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    for wanted in (kind, None):
        try:
            return pa.array(values, wanted)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            continue
    return pa.array([_printable(one) for one in values])


def _changed(rng: Random, table: pa.Table) -> pa.Table:
    """Other types, other names, the same name twice, texts that are not UTF-8, a text that is in every row."""
    at = rng.randrange(table.num_columns)
    name, count = table.column_names[at], table.num_rows
    broken = pa.Array.from_buffers(
        pa.string(),
        count,
        [None, pa.array(range(0, 2 * count + 2, 2), pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe" * count)],
    )
    arrays = (
        pa.array(range(count)),
        pa.array([1.5] * count),
        pa.nulls(count),
        pa.array([b"\xff"] * count, pa.binary()),
        pa.array([[["x"]]] * count),
        pa.array([{"a": 1}] * count),
        pa.array([0] * count, pa.timestamp("ns")),
        pa.array(["x"] * count).dictionary_encode(),
        pa.array(["x"] * count, pa.large_string()),
        pa.array([2**64 - 1] * count, pa.uint64()),
        broken,
        pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["x" * 1_500_000])),
    )
    if rng.random() < 0.2:
        return table.append_column(name, table[name])
    return table.set_column(at, rng.choice((name, name, name, "other", "", "\0", "qid")), rng.choice(arrays))
