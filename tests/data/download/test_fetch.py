from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stackllama.data.download import fetch as module
from stackllama.data.download.fetch import Display, fetch
from stackllama.data.download.listing import Archive, find, open_place
from stackllama.data.download.part import open_part
from stackllama.data.download.remote import Patience, StatusError
from stackllama.data.dump.archive import open_tables
from stackllama.errors import DumpError, RunError, StackllamaError
from tests.data.dumps import shared_dumps
from tests.data.web import Page, Web, listing, packed, serve

NAME = "beer.stackexchange.com.7z"
BULK = 300_000
WHOLE = packed(bulk=BULK)
OTHER = packed(bulk=BULK, seed=1)
DAY = "Wed, 03 Apr 2024 10:00:00 GMT"
LIST, FILE = "/dump/dump_files.xml", f"/dump/{NAME}"


class Shown:
    """A display that remembers."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.opened: list[tuple[str, int, str, int]] = []
        self.notes: list[str] = []

    @contextmanager
    def __call__(self, title: str, total: int, unit: str, done: int) -> Iterator[Display]:
        self.opened.append((title, total, unit, done))
        self.total, self.done = total, done
        yield self

    def advance(self, amount_done: int) -> None:
        self.done += amount_done

    def note(self, text: str) -> None:
        self.notes.append(text)


class Getting:
    """A folder, a server with one archive, and the way of the user: list, site, download."""

    def __init__(self, web: Web, folder: Path) -> None:
        self.web, self.folder = web, folder
        self.page = web.pages[FILE] = Page(WHOLE)
        self.shown = Shown()
        self.listed(WHOLE)

    def listed(self, content: bytes | None) -> None:
        """Let the address have a list, of which NAME has this content, or none."""
        self.web.pages.pop(LIST, None)
        if content is not None:
            self.web.pages[LIST] = Page(listing({NAME: content}))

    def __call__(self, *, tries: int = 6, timeout: float = 5.0, sha256: str | None = None) -> module.Fetched:
        patience = Patience(timeout, (0.001,) * (tries - 1))
        place = open_place(f"{self.web.address}/dump", patience=patience, note=self.shown.note)
        (archive,) = find(place, "beer")
        self.web.requests.clear()
        return fetch(archive, self.folder, show=self.shown, patience=patience, sha256=sha256)

    def fails(self, words: str, kind: type[StackllamaError] = DumpError, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            self(**options)

    @property
    def ranges(self) -> list[str | None]:
        """Range of each request of the archive."""
        return [wanted for wanted, _ in self.web.asked(FILE)]

    def files(self) -> dict[str, bytes]:
        if not self.folder.exists():
            return {}
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def get(tmp_path: Path) -> Iterator[Getting]:
    with serve() as web:
        yield Getting(web, tmp_path / "to" / "here")


def test_an_archive_comes_whole_under_its_name_alone(get: Getting) -> None:
    found = get()
    assert (found.path, found.was_there, found.hashes) == (get.folder / NAME, False, ("sha1",))
    assert get.files() == {NAME: WHOLE}
    assert get.shown.opened == [(NAME, len(WHOLE), "bytes", 0)]
    assert get.shown.done == get.shown.total == len(WHOLE)
    with open_tables(found.path) as tables:
        assert tables.site == "beer.stackexchange.com"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("listed", "chunked"), [(True, False), (True, True), (False, False)])
def test_a_broken_connection_is_taken_up_where_it_stands(
    get: Getting, reset: bool, chunked: bool, listed: bool
) -> None:
    get.page.reset, get.page.chunked = reset, chunked
    get.page.breaks = [100_000, 1, 50_000]
    if not listed:
        get.listed(None)
        get.page.breaks.insert(0, 10)  # of the question whether it is there
    get()
    assert get.files() == {NAME: WHOLE}
    if not reset:  # which may overtake bytes on their way
        assert get.ranges == [None, "bytes=100000-", "bytes=100001-", "bytes=150001-"]
        assert get.shown.notes == [f"the connection to 127.0.0.1 broke off; try {n} of 6 in 0.001 s" for n in (2, 3, 4)]
    assert get.shown.done == get.shown.total == len(WHOLE)


def test_a_file_of_which_nobody_says_how_large_it_is(get: Getting) -> None:
    get.listed(None)
    get.page.chunked = True
    get.fails("does not say how large it is")


def test_another_process_goes_on_if_the_file_is_the_same(get: Getting) -> None:
    get.page.breaks = [120_000, 30_000]
    get.fails(rf"2 times in a row; 150,000 of {len(WHOLE):,} bytes are kept in .*{NAME}.part", tries=2)
    assert get.files()[f"{NAME}.part"] == WHOLE[:150_000]
    assert get.web.asked(FILE) == [(None, None), ("bytes=120000-", '"one"')]
    assert get() == module.Fetched(get.folder / NAME, False, ("sha1",))
    assert get.web.asked(FILE) == [("bytes=150000-", '"one"')]
    assert get.shown.opened[-1] == (NAME, len(WHOLE), "bytes", 150_000)
    assert get.files() == {NAME: WHOLE}


def test_what_came_whole_before_a_kill_is_not_asked_for_again(get: Getting) -> None:
    get.page.breaks = [len(WHOLE) - 1]
    get.fails("kept", tries=1)
    with (get.folder / f"{NAME}.part").open("ab") as file:
        file.write(WHOLE[-1:])
    get()
    assert get.ranges == []
    assert get.files() == {NAME: WHOLE}


def test_a_server_without_ranges_begins_anew(get: Getting) -> None:
    get.page.ranges, get.page.breaks = False, [250_000, 200_000]
    get()
    assert get.ranges == [None, "bytes=250000-", "bytes=200000-"]
    assert sum("begun anew" in note for note in get.shown.notes) == 2
    assert get.shown.done == get.shown.total == len(WHOLE)
    assert get.files() == {NAME: WHOLE}


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("other", [OTHER, packed(bulk=BULK // 2, seed=1), packed(bulk=BULK * 2, seed=1)])
def test_a_file_that_changes_between_two_tries_is_begun_anew(get: Getting, if_range: bool, other: bytes) -> None:
    def change(page: Page) -> None:
        if len(get.web.asked(FILE)) == 1:
            page.content, page.etag = other, '"two"'

    get.listed(None)
    get.page.if_range = if_range
    get.page.then, get.page.breaks = lambda page: setattr(page, "then", change), [1, 100_000]
    get()
    assert get.web.asked(FILE)[:2] == [(None, None), ("bytes=100000-", '"one"')]
    assert get.files() == {NAME: other}
    assert get.shown.done == get.shown.total == len(other)


def test_a_file_that_changed_since_yesterday_is_begun_anew(get: Getting) -> None:
    get.page.breaks = [100_000]
    get.fails("kept", tries=1)
    get.page.content, get.page.etag = OTHER, '"two"'
    get.listed(OTHER)
    get()
    assert get.ranges == [None]
    assert get.files() == {NAME: OTHER}


def test_without_list_too(get: Getting) -> None:
    get.listed(None)
    get.page.breaks = [1, 100_000]
    get.fails("kept", tries=1)
    get.page.content, get.page.etag = OTHER, '"two"'
    found = get()
    assert get.ranges == [None]
    assert get.files() == {NAME: OTHER}
    assert found.hashes == ()


def test_a_changed_file_that_looks_the_same_is_caught_by_its_hash(get: Getting) -> None:
    get.page.breaks = [100_000]
    get.page.then = lambda page: setattr(page, "content", OTHER)
    get.fails(f"came damaged, and was removed: its sha1 is .*, not {hashlib.sha1(WHOLE).hexdigest()}")
    assert get.ranges == [None, "bytes=100000-"]
    assert get.files() == {}


@pytest.mark.parametrize(
    ("etag", "modified", "listed", "expected"),
    [
        (None, None, True, ("bytes=100000-", None)),  # the hash is going to tell
        (None, None, False, (None, None)),  # nothing would
        ('W/"one"', DAY, False, ("bytes=100000-", DAY)),
        ('W/"one"', None, False, (None, None)),
        ('"one"', DAY, False, ("bytes=100000-", '"one"')),
    ],
)
def test_what_makes_sure_that_it_is_the_same_file(
    get: Getting, etag: str | None, modified: str | None, listed: bool, expected: tuple[str | None, str | None]
) -> None:
    get.listed(WHOLE if listed else None)
    get.page.etag, get.page.modified, get.page.if_range = etag, modified, False
    get.page.breaks = [100_000] if listed else [1, 100_000]
    get()
    assert get.web.asked(FILE) == [(None, None), expected]
    assert get.files() == {NAME: WHOLE}


@pytest.mark.parametrize(
    "said", ["bytes 5-9/10", f"bytes 100001-{len(WHOLE) - 1}/{len(WHOLE)}", "bytes */10", "nonsense"]
)
def test_another_part_than_was_asked_for_is_not_put_behind(get: Getting, said: str) -> None:
    def mislead(page: Page) -> None:
        page.content_range = said if page.content_range is None else None

    get.page.breaks, get.page.then = [100_000], mislead
    get()
    assert get.ranges == [None, "bytes=100000-", None]
    assert get.files() == {NAME: WHOLE}


def test_a_part_that_nobody_asked_for(get: Getting) -> None:
    get.page.content_range = f"bytes 0-{len(WHOLE) - 1}/{len(WHOLE)}"
    get.fails("another part of the file.*nothing of .* has come")
    assert get.files() == {}


def test_a_range_that_the_server_finds_too_far_is_begun_anew(get: Getting) -> None:
    def refuse_next(page: Page) -> None:
        page.statuses, page.then = [416], lambda _: None

    get.page.breaks, get.page.then = [100_000], refuse_next
    get()
    assert get.ranges == [None, "bytes=100000-", None]
    assert get.files() == {NAME: WHOLE}


def test_a_wrong_hash_removes_what_came(get: Getting) -> None:
    get.page.content = OTHER
    assert len(OTHER) == len(WHOLE)
    get.fails("came damaged, and was removed: its sha1 is")
    assert get.files() == {}


def test_a_hash_from_a_trusted_source(get: Getting) -> None:
    get.fails(f"its sha256 is .*, not {'0' * 64}", sha256="0" * 64)
    assert get.files() == {}
    right = hashlib.sha256(WHOLE).hexdigest()
    assert get(sha256=right).hashes == ("sha1", "sha256")
    assert get(sha256=right).was_there


def test_a_page_instead_of_an_archive(get: Getting) -> None:
    get.page.content = b"<!DOCTYPE html><title>Please log in</title>"
    get.fails("is no .7z archive: it begins with b'<!DOCTYPE html>", tries=1)
    get.page.content = b""
    get.fails("is no .7z archive: it begins with b''", tries=1)
    assert get.files() == {}


def test_a_page_in_between_costs_nothing_of_what_has_come(get: Getting) -> None:
    get.page.breaks = [100_000]
    get.fails("kept", tries=1)
    get.page.content, get.page.ranges = b"<html>Please log in</html>", False
    get.fails("is no .7z archive", tries=1)
    get.page.content, get.page.ranges = WHOLE, True
    get()
    assert get.ranges == ["bytes=100000-"]
    assert get.files() == {NAME: WHOLE}


def test_a_server_that_says_nothing(get: Getting) -> None:
    get.page.silent = threading.Event()
    get.fails("127.0.0.1 sends nothing, 2 times in a row; nothing of .* has come", tries=2, timeout=0.1)
    get.page.silent.set()
    assert get.files() == {}


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_archive_of_the_list_that_is_not_given_out(get: Getting, status: int) -> None:
    get.page.statuses = [status]
    get.fails(f"{FILE} answers {status}", StatusError)
    assert get.ranges == [None]
    assert get.files() == {}


def test_a_server_in_trouble(get: Getting) -> None:
    get.page.statuses = [503, 500, 429]
    get()
    assert len(get.ranges) == 4
    get.page.statuses = [503] * 9
    shutil.rmtree(get.folder)
    get.fails("127.0.0.1 answers 503 Service Unavailable, 3 times in a row", tries=3)
    assert len(get.ranges) == 3


@pytest.mark.parametrize("length", [len(WHOLE) - 10, len(WHOLE) + 10])
def test_a_size_that_is_not_the_one_of_the_list(get: Getting, length: int) -> None:
    get.page.length = length
    get.fails(f"has {length:,} bytes, where its list says {len(WHOLE):,}")
    assert get.files() == {}


def test_a_server_that_says_too_much_or_too_little_where_no_list_does(get: Getting) -> None:
    get.listed(None)
    get.page.length = len(WHOLE) - 10
    get.fails("came damaged, and was removed: .* is cut off or damaged")
    assert get.files() == {}
    get.page.length = len(WHOLE) + 10
    get.fails("4 times in a row", tries=4)
    assert NAME not in get.files()


def test_a_body_that_does_not_end(get: Getting) -> None:
    get.page.content, get.page.chunked = WHOLE + b"more", True
    get.fails("is longer than it should be")
    assert get.files() == {}


def test_a_redirect_is_followed_with_the_range(get: Getting) -> None:
    get.web.pages["/elsewhere"] = get.page
    get.page.breaks = [100_000]
    get.web.pages[FILE] = Page(b"", location="/elsewhere")
    get()
    assert get.web.asked("/elsewhere") == [(None, None), ("bytes=100000-", '"one"')]
    assert get.files() == {NAME: WHOLE}


def test_a_redirect_to_a_file_is_not(get: Getting, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(WHOLE)
    get.page.location = (tmp_path / "secret").as_uri()
    get.fails("is not followed")
    assert get.files() == {}


def test_what_is_there_and_right_is_kept(get: Getting) -> None:
    get()
    before = (get.folder / NAME).stat()
    assert get() == module.Fetched(get.folder / NAME, True, ("sha1",))
    assert get.ranges == []
    assert (get.folder / NAME).stat() == before


@pytest.mark.parametrize("content", [OTHER, WHOLE[:-1], WHOLE + b"more", b""])
@pytest.mark.parametrize("listed", [True, False])
def test_another_file_of_that_name_is_left_alone(get: Getting, content: bytes, listed: bool) -> None:
    if not listed:
        get.listed(None)
    get.folder.mkdir(parents=True)
    (get.folder / NAME).write_bytes(content)
    if content == OTHER and not listed:  # nothing tells them apart
        assert get().was_there
    else:
        get.fails("is there and is not what .* has now", RunError)
    assert get.files() == {NAME: content}


def test_a_full_disk_keeps_what_has_come(get: Getting, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def fill(descriptor: int, data: bytes, offset: int) -> int:
        if offset + len(data) > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)
    get.page.breaks = [150_000]
    get.fails(f"is full, so {NAME} was not written; what has come is kept in {NAME}.part. Free some", RunError)
    kept = len(get.files()[f"{NAME}.part"])
    assert 0 < kept <= 200_000
    monkeypatch.undo()
    get()
    assert get.ranges == [f"bytes={kept}-"]
    assert get.files() == {NAME: WHOLE}


def test_a_disk_without_room_is_told_before(get: Getting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    get.fails(r"30\d kB are to come, and the disk that holds .* has 1.00 kB free", RunError)
    assert get.files() == {}


def test_ctrl_c_keeps_what_has_come(get: Getting, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(get.shown, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        get()
    kept = len(get.files()[f"{NAME}.part"])
    assert 0 < kept <= len(WHOLE)
    monkeypatch.undo()
    get()
    assert get.shown.opened[-1] == (NAME, len(WHOLE), "bytes", kept)
    assert get.files() == {NAME: WHOLE}


def test_two_processes_do_not_write_one_part(get: Getting) -> None:
    get.folder.mkdir(parents=True)
    with open_part(get.folder / NAME):
        get.fails("is being written by another process", RunError)
    get()


def test_nothing_is_written_through_a_link(get: Getting, tmp_path: Path) -> None:
    get.folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (get.folder / f"{NAME}.part").symlink_to(tmp_path / "precious")
    get.fails("cannot be written", RunError)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_that_is_a_file(get: Getting) -> None:
    get.folder.parent.mkdir()
    get.folder.write_text("a file")
    get.fails("cannot be written", RunError)


@pytest.mark.parametrize(
    "note",
    ["", "{", "[]", "null", '"text"', '{"url": 1}', '{"url": "u", "size": "x", "hashes": {}, "validator": null}', None],
)
def test_a_part_of_which_nothing_is_known_is_begun_anew(get: Getting, note: str | None) -> None:
    get.folder.mkdir(parents=True)
    (get.folder / f"{NAME}.part").write_bytes(OTHER[:1000])
    if note is not None:
        (get.folder / f"{NAME}.part.json").write_text(note)
    get()
    assert get.ranges == [None]
    assert get.files() == {NAME: WHOLE}


def test_a_part_that_is_too_long_is_begun_anew(get: Getting) -> None:
    get.page.breaks = [1000]
    get.fails("kept", tries=1)
    assert json.loads(get.files()[f"{NAME}.part.json"])["validator"] == '"one"'
    with (get.folder / f"{NAME}.part").open("ab") as file:
        file.write(WHOLE)
    get()
    assert get.files() == {NAME: WHOLE}


def test_checking_a_long_file_is_shown(get: Getting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG", 1000)
    get()
    assert get.shown.opened[-1] == (f"{NAME}: checking", len(WHOLE), "bytes", 0)
    assert get.shown.done == len(WHOLE)


def test_a_real_archive_that_breaks_off_all_the_time(tmp_path: Path) -> None:
    content = (shared_dumps() / NAME).read_bytes()
    with serve() as web:
        get = Getting(web, tmp_path)
        get.listed(content)
        # Every try brings more than is worth a new count, so two failures in a row are never reached.
        get.page.content, get.page.breaks = content, [1_100_000, 1_100_000]
        get(tries=2)
        assert get.ranges == [None, "bytes=1100000-", "bytes=2200000-"]
    with open_tables(tmp_path / NAME) as tables:
        assert {name for name, _ in tables.streams(["Posts", "Users"])} == {"Posts", "Users"}


def test_an_archive_of_no_bytes(tmp_path: Path) -> None:
    with serve() as web:
        web.pages["/x.7z"] = Page(b"")
        archive = Archive("x.7z", f"{web.address}/x.7z", 0, {})
        with pytest.raises(DumpError, match=r"is no \.7z archive"):
            fetch(archive, tmp_path, show=Shown(), patience=Patience())
    assert list(tmp_path.iterdir()) == []
