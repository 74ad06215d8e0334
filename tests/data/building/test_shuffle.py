"""Posts are dealt to buckets by their question, and come back as they were."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from stackllama.data.building.shuffle import POSTS, bucket_count, bucket_of, read_dealt, write_dealt


def posts(ids: list[int], questions: list[int]) -> pa.Table:
    rows = [
        {"id": one, "question": of, "answers": one != of, "title": "", "tags": ["t"], "text": f"text {one}"}
        | {"votes": 1, "date": "", "owner_name": "", "license": ""}
        for one, of in zip(ids, questions, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=POSTS)


def test_every_post_comes_back_once_in_the_bucket_of_its_question(tmp_path: Path) -> None:
    ids, questions = list(range(1, 301)), [1 + one // 3 for one in range(300)]
    paths = []
    for piece in range(3):
        part = posts(ids[piece::3], questions[piece::3])
        paths.append(tmp_path / f"{piece}.arrow")
        write_dealt(paths[-1], part, bucket_of("s", part["question"].to_numpy(), 7))
    found = [pa.concat_tables(read_dealt(paths, bucket)) for bucket in range(7)]
    assert sorted(one for table in found for one in table["id"].to_pylist()) == ids
    owners = [set(table["question"].to_pylist()) for table in found]
    assert sum(map(len, owners)) == len(set(questions))  # no question is in two buckets
    assert all(len(owner) > 5 for owner in owners)
    assert found[0].schema.equals(POSTS)
    row = found[3].to_pylist()[0]
    assert row["text"] == f"text {row['id']}"


def test_a_piece_without_posts_has_nothing_in_any_bucket(tmp_path: Path) -> None:
    write_dealt(tmp_path / "x", POSTS.empty_table(), np.zeros(0, np.int32))
    (table,) = read_dealt([tmp_path / "x"], 0)
    assert table.num_rows == 0
    assert table.schema.equals(POSTS)


def test_buckets_depend_on_site_and_question_alone_and_are_of_one_size() -> None:
    numbers = np.arange(1, 100_001, dtype=np.int64)
    one, other = (bucket_of(site, numbers, 10) for site in ("a.example", "b.example"))
    assert np.bincount(one).min() > 9500
    assert 0.05 < (one == other).mean() < 0.15
    # Worked out in whole numbers of Python, step by step: they must not change, or a stopped build mixes two rules.
    assert bucket_of("a.example", np.array([1, 2, 3, 2**40, -5]), 1000).tolist() == [95, 471, 95, 675, 236]


def test_how_many_buckets() -> None:
    assert bucket_count(1000, 1 << 20) == 1
    assert bucket_count(3 << 30, 1 << 24) == 96
    assert bucket_count(100 << 30, 100 << 20) == 512


def test_each_post_may_name_its_own_site() -> None:
    sites, ids = [f"s{number % 3000}" for number in range(50_000)], np.arange(50_000)
    started = time.process_time()
    found = bucket_of(pa.chunked_array([sites]), ids, 7)
    assert time.process_time() - started < 2  # minutes, were all posts looked through for each site
    for site in ("s0", "s7", "s2999"):
        mine = np.array(sites) == site
        assert (found[mine] == bucket_of(site, ids[mine], 7)).all()
