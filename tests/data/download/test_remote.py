from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from stackllama.data.download.remote import (
    LONGEST_WAIT,
    WORTH,
    BrokenError,
    Patience,
    StatusError,
    Tries,
    UnknownHostError,
    check_address,
    connect,
    pieces,
    size_of,
    validator_of,
)
from stackllama.errors import DumpError, RecipeError
from tests.data.web import Page, Web, serve


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as found:
        yield found


def get(url: str, timeout: float = 5.0) -> bytes:
    with closing(connect(url, timeout=timeout)) as response:
        return b"".join(pieces(response, url))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "archive.org/download/x",
        "ftp://archive.org/x",
        "file:///etc",
        "http://",
        "http:///x",
        "http://a b/x",
        "http://user:secret@host/x",
        "http://host/x?y",
        "http://host/x#y",
        "http://host:99999/x",
        "http://[::1/x",
        "http://host/\x1b[31m",
        "http://h\u00f6st/x",
        "http://host\\x",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(RecipeError, match="cannot be used"):
        check_address(address)


def test_an_address_may_end_in_a_slash() -> None:
    assert check_address("https://archive.org/download/x//") == "https://archive.org/download/x"
    assert check_address("http://[::1]:80/x") == "http://[::1]:80/x"


def test_a_body_whole_and_in_chunks(web: Web) -> None:
    web.pages = {"/a": Page(b"x" * 600_000), "/b": Page(b"y" * 1000, chunked=True)}
    assert get(f"{web.address}/a") == b"x" * 600_000
    assert get(f"{web.address}/b") == b"y" * 1000


@pytest.mark.parametrize("page", [Page(b"x" * 1000), Page(b"x" * 1000, chunked=True), Page(b"x" * 1000, reset=True)])
def test_what_came_before_a_break_is_given(web: Web, page: Page) -> None:
    page.breaks = [700]
    web.pages["/a"] = page
    got: list[bytes] = []
    with closing(connect(f"{web.address}/a", timeout=5)) as response:
        body = pieces(response, f"{web.address}/a")
        with pytest.raises(BrokenError, match="broke off"):
            got.extend(body)
    assert b"".join(got) == b"x" * 700 or page.reset  # a reset may overtake the bytes before it


def test_no_more_is_read_than_was_said(web: Web) -> None:
    web.pages["/a"] = Page(b"x" * 900_000, length=400_000)
    assert get(f"{web.address}/a") == b"x" * 400_000


def test_silence_ends_with_the_timeout(web: Web) -> None:
    silent = threading.Event()
    web.pages["/a"] = Page(b"", silent=silent)
    with pytest.raises(BrokenError, match="sends nothing"):
        get(f"{web.address}/a", timeout=0.2)
    silent.set()


def test_nobody_there() -> None:
    with serve() as gone:
        pass
    with pytest.raises(BrokenError, match="takes no connection"):
        get(f"{gone.address}/a")
    with pytest.raises(UnknownHostError, match=r"nowhere\.invalid is not found"):
        get("http://nowhere.invalid/a")


def test_answers_that_stay_are_told_from_those_that_pass(web: Web) -> None:
    web.pages["/a"] = Page(b"", statuses=[404, 403, 204, 999, 429, 500, 503, 416], headers={"Retry-After": "7"})
    for status, words in ((404, "404 Not Found"), (403, "403 Forbidden"), (204, "204 No Content"), (999, "999")):
        with pytest.raises(StatusError, match=words) as refused:
            get(f"{web.address}/a")
        assert refused.value.status == status
    for status in (429, 500, 503, 416):
        with pytest.raises(BrokenError, match=str(status)) as broken:
            get(f"{web.address}/a")
        assert (broken.value.status, broken.value.wait) == (status, 7.0)


@pytest.mark.parametrize(
    ("asked", "wait"),
    [
        ("7", 7.0),
        ("301", LONGEST_WAIT),
        ("9" * 400, LONGEST_WAIT),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_WAIT),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("-7", 0.0),
        ("1e9", 0.0),
        ("nan", 0.0),
        ("", 0.0),
    ],
)
def test_a_server_gets_no_longer_pause_than_the_longest(web: Web, asked: str, wait: float) -> None:
    web.pages["/a"] = Page(b"", statuses=[503], headers={"Retry-After": asked})
    with pytest.raises(BrokenError) as broken:
        get(f"{web.address}/a")
    assert broken.value.wait == wait


def test_redirects_are_followed_with_all_headers(web: Web) -> None:
    web.pages = {"/a": Page(b"", location="/b c"), "/b%20c": Page(b"0123456789")}
    with closing(connect(f"{web.address}/a", timeout=5, headers={"Range": "bytes=4-"})) as response:
        assert response.status == 206
        assert b"".join(pieces(response, "")) == b"456789"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "javascript:0"])
def test_redirects_to_anything_but_the_web_are_not_followed(web: Web, target: str) -> None:
    web.pages["/a"] = Page(b"", location=target)
    with pytest.raises(DumpError, match="no address of the web"):
        get(f"{web.address}/a")


def test_redirects_in_circles_and_to_nonsense(web: Web) -> None:
    web.pages = {"/a": Page(b"", location="/a"), "/b": Page(b"", location="http://[::1/")}
    with pytest.raises(DumpError, match="in circles"):
        get(f"{web.address}/a")
    assert len(web.requests) == 11
    with pytest.raises(DumpError, match="no address of the web"):
        get(f"{web.address}/b")


def test_sizes_and_validators(web: Web) -> None:
    day = "Wed, 03 Apr 2024 10:00:00 GMT"
    web.pages = {
        "/strong": Page(b"abc", modified=day),
        "/weak": Page(b"abc", etag='W/"x"', modified=day),
        "/none": Page(b"abc", etag=None, chunked=True),
    }
    found = {}
    for name in web.pages:
        with closing(connect(web.address + name, timeout=5)) as response:
            found[name] = validator_of(response)
            if name == "/none":
                with pytest.raises(DumpError, match="does not say how large"):
                    size_of(response, name)
            else:
                assert size_of(response, name) == 3
    assert found == {"/strong": '"one"', "/weak": day, "/none": None}


def test_tries_are_bounded_and_forgiven_for_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    notes: list[str] = []
    tries = Tries(Patience(waits=(1, 2)), notes.append)
    tries.failed(BrokenError("no"))
    tries.failed(BrokenError("no", wait=5))
    tries.failed(BrokenError("no"), arrived=WORTH)
    tries.failed(BrokenError("no", wait=1e9), arrived=WORTH + 1)
    with pytest.raises(DumpError, match="no, 3 times in a row"):
        tries.failed(BrokenError("no"), arrived=WORTH + 2)
    assert slept == [1, 5, 1, 300]
    assert notes[:2] == ["no; try 2 of 3 in 1 s", "no; try 3 of 3 in 5 s"]
