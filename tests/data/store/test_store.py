from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stackllama.data.posts import Answer, Attribution, Document, Pair, Question
from stackllama.data.store import store
from stackllama.errors import DataError, RunError

BY = Attribution("https://s/a/1", "Ada", 1, "https://s/users/1", "CC BY-SA 4.0")
NOBODY = Attribution("https://s/a/2", "anonymous", None, None, "CC BY-SA 2.5")


def some(number: int) -> Question:
    day = "2020-01-01T00:00:00.000"
    answers = (
        Answer(1, "first\n\n```\n\tx\n```", 3, True, day, BY, 12),
        Answer(2, "ünï \U0001f37a", -1, False, day, NOBODY),
    )
    return Question("s", number, "t", "$a_b$", ("x", "y"), 2, day, BY, answers, (Pair(0, 1, 4),))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    questions = [some(3), Question("s", 1, "", "t", (), 0, "d", NOBODY, ()), some(2)]
    documents = [Document("s", 1, "plain", BY), Document("s", 2, "", NOBODY)]
    store.write_questions(tmp_path, "sft", questions)
    store.write_documents(tmp_path, "sft", documents)
    store.write_questions(tmp_path, "eval", [])
    assert store.read_questions(tmp_path, "sft") == questions
    assert store.read_documents(tmp_path, "sft") == documents
    assert store.read_questions(tmp_path, "eval") == []


def test_the_manifest_counts_and_names_every_file(tmp_path: Path) -> None:
    returned = store.write_questions(
        tmp_path / "data", "reward", [some(number) for number in range(7)], rows_per_shard=3
    )
    manifest = store.read_manifest(tmp_path / "data")
    assert manifest == returned
    part = manifest.parts["questions/reward"]
    assert part.counts == {"questions": 7, "answers": 14, "pairs": 7}
    assert [shard.rows for shard in part.shards] == [3, 3, 1]
    assert files(tmp_path / "data") == {"manifest.json"} | {shard.file for shard in part.shards}
    store.write_questions(tmp_path / "data", "ppo", [some(8)])
    assert store.read_manifest(tmp_path / "data").total("questions") == 8
    assert [question.id for question in store.read_questions(tmp_path / "data", "reward")] == list(range(7))


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for split in ("sft", "eval"):
            store.write_questions(tmp_path / name, split, (some(number) for number in range(50)), rows_per_shard=20)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]
    fingerprint = store.read_manifest(tmp_path / "a").fingerprint
    store.write_questions(tmp_path / "a", "eval", [some(1)])
    assert store.read_manifest(tmp_path / "a").fingerprint != fingerprint


def test_writing_again_replaces_and_leaves_no_old_shard(tmp_path: Path) -> None:
    store.write_questions(tmp_path, "sft", [some(1), some(2)], rows_per_shard=1)
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "ledger.parquet").write_text("not ours either")
    manifest = store.write_questions(tmp_path, "sft", [some(3)])
    assert [question.id for question in store.read_questions(tmp_path, "sft")] == [3]
    shards = {shard.file for shard in manifest.parts["questions/sft"].shards}
    assert files(tmp_path) == {"manifest.json", "notes.txt", "ledger.parquet"} | shards


def test_what_a_killed_writer_left_is_cleared_and_never_read(tmp_path: Path) -> None:
    store.write_questions(tmp_path, "sft", [some(1)])
    good = files(tmp_path)
    for leftover in (
        "questions-sft-00000-0123456789ab.parquet",
        "questions-sft-00001-x.parquet.partial",
        "manifest.json.partial",
    ):
        (tmp_path / leftover).write_bytes(b"half")
    assert [question.id for question in store.read_questions(tmp_path, "sft")] == [1]
    store.write_questions(tmp_path, "sft", [some(1)])
    assert files(tmp_path) == good


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_questions(tmp_path, "sft", [some(1)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replaced = store._replace
    calls = 0

    def full(path: Path, content: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            path.with_name(path.name + ".partial").write_bytes(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced(path, content)

    monkeypatch.setattr(store, "_replace", full)
    with pytest.raises(RunError, match="No space left on device"):
        store.write_questions(tmp_path, "sft", [some(number) for number in range(5)], rows_per_shard=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_error_of_the_source_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store.write_questions(tmp_path, "sft", [some(1)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def source() -> Iterator[Question]:
        yield some(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_questions(tmp_path, "sft", source(), rows_per_shard=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_changed_and_missing_shards_are_noticed(tmp_path: Path) -> None:
    manifest = store.write_questions(tmp_path, "sft", [some(1)])
    path = tmp_path / manifest.parts["questions/sft"].shards[0].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="sha256 differs"):
        store.read_questions(tmp_path, "sft")
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        store.read_questions(tmp_path, "sft")


@pytest.mark.parametrize("change", [{"schema": 99}, {"parts": 3}, {"parts": {"questions/sft": {}}}])
def test_a_foreign_manifest_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    store.write_questions(tmp_path, "sft", [some(1)])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="build the data again"):
        store.read_questions(tmp_path, "sft")


def test_absent_stores_and_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="build the data first"):
        store.read_questions(tmp_path, "sft")
    store.write_questions(tmp_path, "sft", [some(1)])
    with pytest.raises(DataError, match=r"no questions in the split 'eval' \(it has questions/sft\)"):
        store.read_questions(tmp_path, "eval")
    with pytest.raises(DataError, match="no name of a split"):
        store.write_questions(tmp_path, "../sft", [])
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be written"):
        store.write_questions(tmp_path / "file", "sft", [some(1)])
