from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from stackllama.errors import RunError
from stackllama.files import (
    atomic_file,
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    check_writable,
    digest_folder,
    digest_json,
    read_json,
    readable_size,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", refuse)


def write_and_fail(target: Path) -> None:
    with atomic_folder(target) as folder:
        (folder / "two").write_text("2")
        raise KeyError


def test_text_and_json_come_back(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "new" / "a.txt", "é\nb")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\xc3\xa9\nb"
    atomic_write_json(tmp_path / "b.json", {"z": 1, "a": [1.5, None, "é"]})
    assert read_json(tmp_path / "b.json") == {"z": 1, "a": [1.5, None, "é"]}
    assert names(tmp_path) == ["b.json", "new"]


def test_what_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "a.json", float("nan"))
    assert read_json(tmp_path / "a.json") == 1


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_text(tmp_path / "a", "old")
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(RunError, match=r"is full, so a was not written"):
            atomic_write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_reported_by_a_library_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is full"), atomic_folder(tmp_path / "model"):
        raise RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
    assert names(tmp_path) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with atomic_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    assert names(target) == ["one"]
    with pytest.raises(KeyError):
        write_and_fail(target)
    assert names(target) == ["one"]
    with atomic_folder(target) as folder:
        (folder / "three").write_text("3")
    assert names(target) == ["three"]
    assert names(tmp_path) == ["final"]


def test_leftovers_of_dead_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    (tmp_path / f".a.tmp-{dead}").write_text("half")
    (tmp_path / f".a.tmp-{os.getppid()}").write_text("of a living process")
    (tmp_path / ".ab.tmp-1x").write_text("of another file")
    atomic_write_text(tmp_path / "a", "whole")
    assert names(tmp_path) == sorted([f".a.tmp-{os.getppid()}", ".ab.tmp-1x", "a"])


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (3_337_659, "3.34 MB"),
        (99_960_000, "100 MB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (20_612_000_000, "20.6 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes_for_reading(size: float, shown: str) -> None:
    assert readable_size(size) == shown


def test_a_folder_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"a cannot be written: (File exists|Not a directory)"):
        atomic_write_text(tmp_path / "file" / "a", "x")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "x" * 300 + "/a"])
def test_a_name_too_long_is_told(tmp_path: Path, name: str) -> None:
    for write in (atomic_file, atomic_folder):
        with pytest.raises(RunError, match=r"[ax] cannot be written: File name too long; choose another"):
            write(tmp_path / name).__enter__()
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that the system fills itself")
def test_a_folder_of_the_system_is_told() -> None:
    with pytest.raises(RunError, match="/proc/out cannot be written"), atomic_folder(Path("/proc/out")):
        pass


def test_what_is_missing_while_something_is_written_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "a"):
        (tmp_path / "missing").read_text()


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RunError, match=r"a\.json is not JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path / "b.json")


def test_digests_know_names_and_contents_but_not_the_order_of_keys(tmp_path: Path) -> None:
    for folder, name, text in (("x", "a", "1"), ("y", "a", "1"), ("z", "a", "2"), ("w", "b", "1")):
        atomic_write_text(tmp_path / folder / name, text)
    digests = {folder: digest_folder(tmp_path / folder) for folder in "xyzw"}
    assert digests["x"] == digests["y"]
    assert len(set(digests.values())) == 3
    assert digest_json({"a": 1, "b": 2}) == digest_json(json.loads('{"b": 2, "a": 1}'))
    assert digest_json([1, 2]) != digest_json([2, 1])


def test_where_no_file_can_be_written_is_told_and_the_disk_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "file", "choose")
    check_writable(tmp_path / "new" / "deep" / "file", "choose")
    for wrong in (tmp_path, tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(RunError, match=r"cannot be written: .*; choose"):
            check_writable(wrong, "choose")
    assert names(tmp_path) == ["file"]


def test_names_that_are_no_utf8_have_a_digest_too() -> None:
    assert len({digest_json("caf\udce9"), digest_json("caf?"), digest_json("café")}) == 3
