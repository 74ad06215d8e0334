"""A table is cut into pieces that together are the table, wherever it lies and however it is cut."""

from __future__ import annotations

import io
from pathlib import Path

import py7zr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackllama.data.dump import pieces
from stackllama.data.dump.archive import open_tables
from stackllama.data.dump.pieces import Piece, Source, cut, piece_size
from stackllama.data.dump.rows import rows
from stackllama.errors import DumpError, TruncatedDumpError
from tests.data.dumps import answer, question, table

POSTS = [question(1), *[answer(n, 1, Body="x" * (n % 7) * 90) for n in range(2, 60)], question(70)]


def read(piece: Piece, **options: bool) -> list[dict[str, str]]:
    with piece.open() as stream:
        return list(rows(stream, table=piece.table, place=piece.place, **options))


def cut_file(path: Path, size: int) -> list[Piece]:
    with open_tables(path) as tables:
        return list(cut(Source(0, str(path), "s"), tables, ["Posts"], size))


@pytest.mark.parametrize("size", [1, 7, 100, 333, 1000, 4096, 10**6])
def test_pieces_of_a_file_are_the_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "Posts.xml"
    path.write_bytes(table("Posts", POSTS))
    found = cut_file(path, size)
    assert [row for piece in found for row in read(piece)] == POSTS
    assert [piece.start for piece in found] == [0, *[piece.stop for piece in found[:-1]]]
    assert found[-1].stop == path.stat().st_size
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    assert len({piece.name for piece in found}) == len(found)
    assert (len(found) > 1) == (size < 4097)


@pytest.mark.parametrize("size", [100, 1000, 10**6])
def test_an_archive_is_cut_where_a_file_is(tmp_path: Path, size: int) -> None:
    path, packed = tmp_path / "Posts.xml", tmp_path / "s.7z"
    path.write_bytes(table("Posts", POSTS))
    with py7zr.SevenZipFile(packed, "w") as archive:
        archive.write(path, "Posts.xml")
    of_file, of_archive = cut_file(path, size), cut_file(packed, size)
    assert [(one.start, one.stop, one.last) for one in of_file] == [
        (one.start, one.stop, one.last) for one in of_archive
    ]
    assert b"".join(one.data or b"" for one in of_archive) == path.read_bytes()
    assert [read(one) for one in of_file] == [read(one) for one in of_archive]


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([b"<row ", b"<row", b"<", b"x" * 50, b"<rowing ", b"\n"]), max_size=40),
    st.integers(1, 200),
    st.integers(1, 64),
)
def test_streams_and_files_agree_on_any_bytes(parts: list[bytes], size: int, step: int) -> None:
    content = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_STEP", step)
        found = list(pieces._cut_stream(io.BytesIO(content), "Posts", size))
        ends: list[int] = []
        start, goal, file = 0, size, io.BytesIO(content)
        while not ends or ends[-1] < len(content):
            ends.append(pieces._next_row(file, goal, len(content), "Posts"))
            start, goal = ends[-1], (ends[-1] // size + 1) * size
            if start == len(content):
                break
    assert b"".join(data for _, data, _ in found) == content
    assert [start + len(data) for start, data, _ in found] == ends


def test_where_a_table_breaks_is_told_in_bytes_of_the_table(tmp_path: Path) -> None:
    content = table("Posts", POSTS)
    cut_off = content[: content.index(b"70", len(content) - 400)]
    damaged = content.replace(b'Id="40"', b'Id="40', 1)
    path = tmp_path / "Posts.xml"
    told = set()
    for size in (300, 2000, 10**6):
        path.write_bytes(cut_off)
        *whole, last = cut_file(path, size)
        assert all(read(piece) for piece in whole)
        with pytest.raises(TruncatedDumpError) as caught:
            read(last)
        assert len(read(last, allow_truncated=True)) + sum(len(read(piece)) for piece in whole) == len(POSTS) - 1
        told.add(("cut", len(content[: caught.value.byte].rstrip())))
        path.write_bytes(damaged)
        for piece in cut_file(path, size):
            try:
                read(piece, allow_truncated=True)
            except DumpError as error:
                byte = int(str(error).split("after byte ")[1].split(",")[0])
                told.add(("damaged", len(content[:byte].rstrip())))
    places = dict(told)
    assert len(told) == 2  # the same place, white space aside, however it was cut
    assert content[: places["cut"]].endswith(b"/>")
    assert content[: places["damaged"]].endswith(b"/>")
    assert b'Id="40"' in content[places["damaged"] :][:64]


def test_a_table_without_rows_is_one_piece_and_an_endless_row_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "Posts.xml"
    path.write_bytes(table("Posts", []))
    (only,) = cut_file(path, 10**6)
    assert read(only) == []
    monkeypatch.setattr(pieces, "LONGEST", 5000)
    path.write_bytes(b"<posts>" + b"x" * 3_000_000)
    with pytest.raises(DumpError, match=r"Posts\.xml has no row in 5000 bytes after byte 100") as told:
        cut_file(path, 100)
    assert str(told.value).startswith(str(path))
    with pytest.raises(DumpError, match="no row in 5000 bytes after byte 100"):
        list(pieces._cut_stream(io.BytesIO(path.read_bytes()), "Posts", 100))


def test_how_large_pieces_are() -> None:
    assert piece_size(1000) == 1 << 20
    assert piece_size(16 << 20) == 2 << 20
    assert piece_size(3 << 30) == 1 << 24
    assert piece_size(100 << 30) == 100 << 20  # 1024 pieces
