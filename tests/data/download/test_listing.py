from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from stackllama.data.download import listing as module
from stackllama.data.download.listing import Archive, ListedPlace, Place, find, open_place
from stackllama.data.download.remote import Patience
from stackllama.errors import DumpError, RecipeError
from tests.data.web import Page, Web, listing, serve

QUICK = Patience(timeout=2.0, waits=(0.01, 0.01))
BEER = b"the beer archive"
NETWORK = {
    name: name.encode()
    for name in (
        "beer.stackexchange.com.7z",
        "beer.meta.stackexchange.com.7z",
        "mathoverflow.net.7z",
        "es.stackoverflow.com.7z",
        "stackoverflow.com-Badges.7z",
        "stackoverflow.com-PostLinks.7z",
        "stackoverflow.com-Posts.7z",
        "stackoverflow.com-Users.7z",
        "stackoverflow.com-Votes.7z",
        "superuser.com.7z",
    )
}


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as found:
        yield found


def place(web: Web, content: bytes | None = None, *, folder: str = "/download/dump") -> Place:
    if content is not None:
        web.pages["/download/dump/dump_files.xml"] = Page(content)
    return open_place(web.address + folder, patience=QUICK, note=lambda _: None)


def names(found: list[Archive]) -> list[str]:
    return [archive.name for archive in found]


def test_the_list_gives_address_size_and_the_better_hash(web: Web) -> None:
    listed = place(web, listing({"z.7z": b"z", "beer.stackexchange.com.7z": BEER, "license.txt": b"text"}))
    assert isinstance(listed, ListedPlace)
    assert list(listed.archives) == ["beer.stackexchange.com.7z", "z.7z"]
    assert listed.archives["beer.stackexchange.com.7z"] == Archive(
        "beer.stackexchange.com.7z",
        f"{web.address}/download/dump/beer.stackexchange.com.7z",
        len(BEER),
        {"sha1": hashlib.sha1(BEER).hexdigest()},
    )
    md5 = '<file name="m.7z"><size>5</size><sha1>short</sha1><md5>00112233445566778899AABBCCDDEEFF</md5></file>'
    listed = place(web, listing({}, more=[md5, '<file name="n.7z"><size>6</size></file>']))
    assert isinstance(listed, ListedPlace)
    assert [one.hashes for one in listed.archives.values()] == [{"md5": "00112233445566778899aabbccddeeff"}, {}]


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("beer.stackexchange.com", ["beer.stackexchange.com.7z"]),
        ("beer.stackexchange.com.7z", ["beer.stackexchange.com.7z"]),
        ("beer", ["beer.stackexchange.com.7z"]),
        ("beer.meta", ["beer.meta.stackexchange.com.7z"]),
        ("mathoverflow", ["mathoverflow.net.7z"]),
        ("superuser", ["superuser.com.7z"]),
        ("es.stackoverflow", ["es.stackoverflow.com.7z"]),
        ("stackoverflow.com-Badges", ["stackoverflow.com-Badges.7z"]),
        *(
            (spelled, [f"stackoverflow.com-{table}.7z" for table in ("Posts", "Users", "Votes", "PostLinks")])
            for spelled in ("stackoverflow.com", "stackoverflow", "stackoverflow.com.7z")
        ),
    ],
)
def test_how_a_site_may_be_spelled(web: Web, site: str, expected: list[str]) -> None:
    assert names(find(place(web, listing(NETWORK)), site)) == expected


def test_a_large_site_in_one_archive_is_that_archive(web: Web) -> None:
    more = {**NETWORK, "stackoverflow.com.7z": b"all"}
    assert names(find(place(web, listing(more)), "stackoverflow")) == ["stackoverflow.com.7z"]


@pytest.mark.parametrize(
    ("site", "near"),
    [
        ("bear", r"did you mean beer\.stackexchange\.com\?"),
        ("stakoverflow.com", r"did you mean stackoverflow\.com or "),
        ("zzzzzz", "--list has all"),
    ],
)
def test_a_site_that_is_not_there(web: Web, site: str, near: str) -> None:
    with pytest.raises(DumpError, match=rf"has no archive of {site}; .*{near}"):
        find(place(web, listing(NETWORK)), site)


@pytest.mark.parametrize("site", ["", ".", "..", "../beer", "a/b", "a\\b", "a..b", "-x", "a\nb", "\x1b[31m", "a" * 300])
def test_names_that_lead_outside_are_refused_before_anything_is_asked(web: Web, site: str) -> None:
    there = place(web, listing(NETWORK))
    before = len(web.requests)
    with pytest.raises(DumpError, match="is no name of a site"):
        find(there, site)
    assert len(web.requests) == before


def test_names_of_the_list_that_lead_outside_are_left_out(web: Web) -> None:
    bad = ["../x.7z", "..\\x.7z", "/etc/x.7z", "a..b.7z", ".x.7z", "-x.7z", "a&#10;b.7z", "a&#x202e;b.7z", "C:x.7z"]
    more = [f'<file name="{name}"><size>5</size></file>' for name in bad]
    more += [f'<file name="size{number}.7z">{size}</file>' for number, size in enumerate(("", "<size>-1</size>"))]
    listed = place(web, listing({"good.7z": b"good"}, more=more))
    assert isinstance(listed, ListedPlace)
    assert list(listed.archives) == ["good.7z"]
    assert listed.refused == len(more)


def test_the_folder_of_an_item(web: Web) -> None:
    content = listing({f"2025/{name}": data for name, data in NETWORK.items()} | {"2025/deep/x.7z": b"x"})
    with pytest.raises(DumpError, match=rf"lie in folders, so give --address {web.address}/download/dump/2025"):
        place(web, content)
    listed = place(web, content, folder="/download/dump/2025/")
    assert isinstance(listed, ListedPlace)
    assert list(listed.archives) == sorted(NETWORK)
    (beer,) = find(listed, "beer")
    assert beer.url == f"{web.address}/download/dump/2025/beer.stackexchange.com.7z"


@pytest.mark.parametrize(
    "content",
    [
        listing(NETWORK)[:-40],
        b"<files><file name='x.7z'></files>",
        b"<files>&undeclared;</files>",
        b"<?xml version='1.0' encoding='utf-8'?><files>\xff</files>",
        b"<files>" + b"<a>" * 5000,
    ],
)
def test_a_damaged_list_is_no_list_without_hashes(web: Web, content: bytes) -> None:
    with pytest.raises(DumpError, match="is damaged"):
        place(web, content)


def test_a_list_of_nothing_and_one_without_end(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DumpError, match="lists no archive that can be used; it has none"):
        place(web, listing({"license.txt": b"text"}))
    monkeypatch.setattr(module, "LONGEST_LIST", 1000)
    with pytest.raises(DumpError, match="longer than 1,000 bytes"):
        place(web, listing(NETWORK))


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>not found</body></html>",
        b"",
        b"not found",
        b'<!DOCTYPE files [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><files><file name="&b;.7z"/></files>',
        b'<!DOCTYPE files SYSTEM "file:///etc/passwd"><files/>',
    ],
)
def test_another_page_in_its_place_is_not_read_as_a_list(web: Web, content: bytes) -> None:
    assert not isinstance(place(web, content), ListedPlace)


def test_a_list_that_comes_in_the_second_try(web: Web) -> None:
    web.pages["/download/dump/dump_files.xml"] = Page(listing(NETWORK), breaks=[100], statuses=[503])
    assert isinstance(place(web), ListedPlace)
    web.pages["/download/dump/dump_files.xml"] = Page(listing(NETWORK), statuses=[503] * 3)
    with pytest.raises(DumpError, match="503 Service Unavailable, 3 times in a row"):
        place(web)


def test_without_a_list_the_server_is_asked_for_each_name(web: Web) -> None:
    web.pages = {
        "/mirror/beer.stackexchange.com.7z": Page(BEER, statuses=[503]),
        "/mirror/so.com-Posts.7z": Page(b"posts", modified="Wed, 03 Apr 2024 10:00:00 GMT", etag=None),
        "/mirror/so.com-Votes.7z": Page(b"votes"),
    }
    there = place(web, folder="/mirror")
    url = f"{web.address}/mirror/beer.stackexchange.com.7z"
    expected = Archive("beer.stackexchange.com.7z", url, len(BEER), {}, listed=False, validator='"one"')
    assert find(there, "beer") == [expected]
    posts, votes = find(there, "so")
    assert (posts.name, posts.size, posts.validator) == ("so.com-Posts.7z", 5, "Wed, 03 Apr 2024 10:00:00 GMT")
    assert votes.name == "so.com-Votes.7z"
    with pytest.raises(DumpError, match=r"there is no wine\.stackexchange\.com\.7z, wine\.stackexchange\.com-Posts"):
        find(there, "wine.stackexchange.com")


def test_a_host_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(DumpError, match="check the address"):
        open_place("http://nowhere.invalid/x", patience=Patience(waits=(600,)), note=lambda _: None)
    with pytest.raises(RecipeError, match="cannot be used"):
        open_place("nowhere", patience=QUICK, note=lambda _: None)
