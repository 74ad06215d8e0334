from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import py7zr
import pytest

from stackllama.data.dump import archive, seven_zip
from stackllama.data.dump.archive import FileTables, digest_dump, open_tables
from stackllama.data.dump.rows import ByteStream
from stackllama.errors import DumpError
from tests.data.dumps import answer, question, site, table
from tests.data.mutations.seven import SOCKET, SYMLINK, WINDOWS_FOLDER, Contents, Member, written
from tests.data.reading import read_questions

POSTS = table("Posts", [question(1), answer(2, 1)])
USERS = table("Users", [{"Id": "7", "DisplayName": "Ada"}])


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with py7zr.SevenZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(content, name)
    return path


def contents(path: Path, *names: str) -> dict[str, bytes]:
    found = {}
    with open_tables(path) as tables:
        for name, stream in tables.streams(names or ("Posts", "Users")):
            pieces = []
            while piece := stream.read(1000):
                pieces.append(piece)
            found[name] = b"".join(pieces)
        assert tables.size(names or ("Posts", "Users")) == sum(map(len, found.values()))
    return found


def workers() -> int:
    return sum(thread.name == "stackllama-7z" for thread in threading.enumerate())


def test_a_folder_a_file_and_an_archive_give_the_same_bytes(tmp_path: Path) -> None:
    folder = site(tmp_path / "beer", [question(1), answer(2, 1)], [{"Id": "7", "DisplayName": "Ada"}])
    packed = pack(
        tmp_path / "beer.7z", {"Badges.xml": b"x" * 5000, "Posts.xml": POSTS, "Tags.xml": b"y", "Users.xml": USERS}
    )
    wanted = {"Posts": POSTS, "Users": USERS}
    assert contents(folder) == contents(folder / "Posts.xml") == contents(packed) == wanted


def test_tables_come_in_stored_order_and_may_be_empty_or_missing(tmp_path: Path) -> None:
    reverse = pack(tmp_path / "a.7z", {"Users.xml": USERS, "Posts.xml": POSTS})
    assert list(contents(reverse)) == ["Users", "Posts"]
    assert contents(pack(tmp_path / "b.7z", {"Posts.xml": POSTS, "Users.xml": b""})) == {"Posts": POSTS, "Users": b""}
    assert contents(pack(tmp_path / "c.7z", {"Posts.xml": POSTS})) == {"Posts": POSTS}
    assert contents(reverse, "Posts") == {"Posts": POSTS}


def test_names_of_sites(tmp_path: Path) -> None:
    folder = site(tmp_path / "quantum-2018", [question(1)])
    lone = tmp_path / "cooking.xml"
    lone.write_bytes(POSTS)
    cases = {
        pack(tmp_path / "beer.stackexchange.com.7z", {"Posts.xml": POSTS}): "beer.stackexchange.com",
        folder: "quantum-2018",
        folder / "Posts.xml": "quantum-2018",
        lone: "cooking",
    }
    for path, name in cases.items():
        with open_tables(path) as tables:
            assert tables.site == name


def test_a_site_in_two_archives_is_one_site(tmp_path: Path) -> None:
    posts = pack(tmp_path / "big.com-Posts.7z", {"Posts.xml": POSTS})
    pack(tmp_path / "big.com-Users.7z", {"Users.xml": USERS})
    assert contents(posts) == {"Posts": POSTS, "Users": USERS}
    with open_tables(posts) as tables:
        assert tables.site == "big.com"


def test_a_table_larger_than_the_pipe_arrives_whole(tmp_path: Path) -> None:
    large = POSTS * 40_000
    assert len(large) > 2 * seven_zip._PIECE * seven_zip._PIECES_IN_PIPE
    assert contents(pack(tmp_path / "a.7z", {"Posts.xml": large, "Users.xml": USERS}))["Posts"] == large


def test_nothing_is_left_running_when_the_reader_stops_early(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.7z", {"Posts.xml": POSTS * 40_000, "Users.xml": USERS})
    with open_tables(path) as tables:
        streams = iter(tables.streams(("Posts", "Users")))
        _, stream = next(streams)
        assert stream.read(10)
        assert workers() == 1
        del streams, stream
        assert workers() == 0


def test_missing_and_foreign_inputs_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("hello")
    no_archive = tmp_path / "no.7z"
    no_archive.write_bytes(b"this is no archive at all, though it is called one")
    zipped = tmp_path / "site.zip"
    zipped.write_bytes(b"PK\x03\x04")
    cases = {
        tmp_path / "absent": "does not exist",
        empty: "no Posts.xml",
        other: "notes.txt",
        no_archive: "cannot be read as a .7z",
        zipped: "packed as .zip",
        pack(tmp_path / "users.7z", {"Users.xml": USERS}): "has no Posts.xml",
    }
    for path, message in cases.items():
        with pytest.raises(DumpError, match=message), open_tables(path):
            pass


def test_what_is_read_of_a_dump_is_hashed_and_nothing_else(tmp_path: Path) -> None:
    folder = site(tmp_path / "beer", [question(1)], [{"Id": "7", "DisplayName": "Ada"}])
    pack(tmp_path / "big-Posts.7z", {"Posts.xml": POSTS})
    pack(tmp_path / "big-Users.7z", {"Users.xml": USERS})
    dumps = [folder, folder / "Posts.xml", tmp_path / "big-Posts.7z"]
    before = [digest_dump(path) for path in dumps]
    (folder / "runs").mkdir()
    for other in (folder / "runs" / "recipe.yaml", folder / "Badges.xml", folder / "notes.txt"):
        other.write_text("x")
    assert [digest_dump(path) for path in dumps] == before
    site(folder, [question(1)], [{"Id": "7", "DisplayName": "Bob"}])
    pack(tmp_path / "big-Users.7z", {"Users.xml": USERS.replace(b"Ada", b"Bob")})
    assert not set(before) & {digest_dump(path) for path in dumps}
    (folder / "Users.xml").unlink()
    (folder / "Users.xml").mkdir()  # stands for whatever cannot be read: tests may run as root, who reads everything
    with pytest.raises(DumpError, match=r"Users\.xml cannot be read: Is a directory; "):
        digest_dump(folder / "Posts.xml")


def test_the_tables_that_are_hashed_are_those_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def streams(self: FileTables, names: Sequence[str]) -> Iterator[tuple[str, ByteStream]]:
        asked.append(tuple(names))
        return original(self, names)

    original = FileTables.streams
    monkeypatch.setattr(FileTables, "streams", streams)
    read_questions(site(tmp_path / "beer", [question(1), answer(2, 1)]))
    assert asked == [archive.TABLES]


def test_a_cut_archive_is_refused_at_every_length(tmp_path: Path) -> None:
    whole = pack(tmp_path / "whole.7z", {"Posts.xml": POSTS, "Users.xml": USERS}).read_bytes()
    path = tmp_path / "cut.7z"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DumpError):
            contents(path)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.7z", {"Posts.xml": POSTS, "Users.xml": USERS})
    packed = bytearray(path.read_bytes())
    packed[60] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(DumpError, match="damaged"):
        contents(path)
    assert workers() == 0


@pytest.mark.parametrize(
    "name", ["../Posts.xml", "a/../../Posts.xml", "/etc/Posts.xml", "C:\\Posts.xml", "..\\Posts.xml"]
)
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # py7zr will not write such names, so the name is put into its listing.
    path = pack(tmp_path / "a.7z", {"Posts.xml": POSTS, "Harmless.xml": b"x"})
    listing = py7zr.SevenZipFile.list

    def hostile(self: py7zr.SevenZipFile) -> list[py7zr.FileInfo]:
        entries = listing(self)
        entries[1].filename = name
        return entries

    monkeypatch.setattr(py7zr.SevenZipFile, "list", hostile)
    with pytest.raises(DumpError, match="leads outside"), open_tables(path):
        pass


def test_a_bomb_is_refused_before_it_is_lit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seven_zip, "SMALL", 1 << 20)
    path = pack(tmp_path / "bomb.7z", {"Posts.xml": bytes(4 << 20)})
    with pytest.raises(DumpError, match="decompression bomb"), open_tables(path):
        pass


def test_a_password_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.7z"
    with py7zr.SevenZipFile(path, "w", password="secret") as file:
        file.writestr(POSTS, "Posts.xml")
    with pytest.raises(DumpError, match="password"), open_tables(path):
        pass


def test_two_sites_in_one_archive_are_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.7z", {"x/Posts.xml": POSTS, "y/Posts.xml": POSTS})
    with pytest.raises(DumpError, match="more than once"), open_tables(path):
        pass


def crafted(path: Path, contents: Contents) -> Path:
    path.write_bytes(written(contents))
    return path


def within(seconds: float, work: Callable[[], object]) -> list[BaseException]:
    """What `work` raises; it has to come to its end in time."""
    raised: list[BaseException] = []

    def tried() -> None:
        try:
            work()
        except DumpError as error:
            raised.append(error)

    thread = threading.Thread(target=tried, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    return raised


def test_archives_of_our_own_writer_are_read_as_those_of_others(tmp_path: Path) -> None:
    members = [Member("Users.xml", USERS), Member("Posts.xml", POSTS), Member("Tags.xml", b"")]
    for method in ("copy", "lzma", "lzma2", "bzip2"):
        for blocks in ([members], [[one] for one in members[:2]]):
            path = crafted(tmp_path / "a.7z", Contents(blocks, method))
            assert contents(path) == {"Users": USERS, "Posts": POSTS}


def test_a_member_that_py7zr_passes_over_is_not_waited_for(tmp_path: Path) -> None:
    members = [Member("Posts.xml", POSTS), Member("Users.xml", USERS, attributes=SOCKET)]
    path = crafted(tmp_path / "a.7z", Contents([members]))
    (raised,) = within(20, lambda: contents(path))
    assert "Users.xml does not decompress (EOFError: the archive ends before it)" in str(raised)


def test_a_member_of_two_kinds_is_told(tmp_path: Path) -> None:
    member = Member("x", b"x", attributes=SYMLINK | WINDOWS_FOLDER)
    with pytest.raises(DumpError, match=r"cannot be read as a \.7z archive"):
        contents(crafted(tmp_path / "a.7z", Contents([[Member("Posts.xml", POSTS), member]])))


def test_sizes_below_zero_cannot_make_up_for_a_bomb(tmp_path: Path) -> None:
    members = [Member("a.xml", b"x", size=2**40), Member("Posts.xml", POSTS)]
    with pytest.raises(DumpError, match=r"claims -[0-9]+ bytes for 'Posts.xml'"):
        contents(crafted(tmp_path / "a.7z", Contents([members])))


@pytest.mark.parametrize("packed", [False, True])
def test_a_large_table_of_contents_is_refused_before_it_is_taken_in(tmp_path: Path, packed: bool) -> None:
    members = [Member(f"{number:060}", b"") for number in range(3000)]
    path = crafted(tmp_path / "a.7z", Contents([[Member("Posts.xml", POSTS), *members]], packed_table=packed))
    with pytest.raises(DumpError, match=r"table of contents of [0-9]{6} bytes, and 262144 are allowed"):
        contents(path)
    usual = Contents([[Member("Posts.xml", POSTS), *members[:500]]], packed_table=packed)
    assert contents(crafted(path, usual)) == {"Posts": POSTS}


@pytest.mark.parametrize("method", ["zstd", "deflate", "ppmd", "unknown"])
def test_methods_that_unpack_all_at_once_or_do_harm_are_refused(tmp_path: Path, method: str) -> None:
    members = [Member("Posts.xml", POSTS)]
    for packed in (Contents([members], method), Contents([members], table_method=method)):
        with pytest.raises(DumpError, match=r"packed by the method [0-9a-f]+ of 7z, and those that are read are copy"):
            contents(crafted(tmp_path / "a.7z", packed))


def test_a_bomb_of_forty_megabytes_is_refused(tmp_path: Path) -> None:
    path = crafted(tmp_path / "a.7z", Contents([[Member("Posts.xml", POSTS + bytes(40 << 20))]]))
    assert path.stat().st_size < 20_000
    with pytest.raises(DumpError, match="decompression bomb"):
        contents(path)


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    folder = site(tmp_path / "beer", [question(1), answer(2, 1)])
    os.mkfifo(folder / "Users.xml")
    os.mkfifo(folder / "lone.xml")
    for path, message in (
        (folder, r"Users\.xml cannot be read: it is no file"),
        (folder / "Posts.xml", r"Users\.xml cannot be read: it is no file"),
        (folder / "lone.xml", "is neither a file nor a folder"),
        (Path("/dev/zero"), "is neither a file nor a folder"),
    ):
        (raised,) = within(20, partial(contents, path))
        assert re.search(message, str(raised))


def test_a_link_that_leads_out_of_its_folder_is_not_followed(tmp_path: Path) -> None:
    folder = site(tmp_path / "beer", [question(1), answer(2, 1)])
    (tmp_path / "private.xml").write_bytes(USERS)
    (folder / "Users.xml").symlink_to("../private.xml")
    for path in (folder, folder / "Posts.xml"):
        with pytest.raises(DumpError, match=r"Users\.xml is a link that leads out of .*, to .*/private\.xml; put"):
            contents(path)
    (tmp_path / "private.xml").rename(folder / "real.xml")
    (folder / "Users.xml").unlink()
    (folder / "Users.xml").symlink_to("real.xml")
    assert contents(folder) == {"Posts": POSTS, "Users": USERS}
    (tmp_path / "named.xml").symlink_to(folder / "Posts.xml")  # a link that is given by its own name is meant
    assert contents(tmp_path / "named.xml") == {"Posts": POSTS}
    pack(tmp_path / "private.7z", {"Users.xml": USERS})
    apart = tmp_path / "apart"
    apart.mkdir()
    pack(apart / "big-Posts.7z", {"Posts.xml": POSTS})
    (apart / "big-Users.7z").symlink_to("../private.7z")
    with pytest.raises(DumpError, match=r"big-Users\.7z is a link that leads out"):
        contents(apart / "big-Posts.7z")


def test_the_name_of_a_site_is_text_whatever_the_disk_says(tmp_path: Path) -> None:
    folder = site(tmp_path / os.fsdecode(b"caf\xe9"), [question(1), answer(2, 1)])
    for path in (folder, folder / "Posts.xml", pack(tmp_path / os.fsdecode(b"caf\xe9.7z"), {"Posts.xml": POSTS})):
        with open_tables(path) as tables:
            assert tables.site == "caf?"
