"""Which archives lie at an address: from the list that items of the Internet Archive have, else by asking for each.

    https://archive.org/download/ITEM/ITEM_files.xml

    <files>
      <file name="beer.stackexchange.com.7z" source="original">
        <mtime>1712082123</mtime> <size>3337659</size> <md5>...</md5> <crc32>...</crc32> <sha1>...</sha1> ...

Files in a folder of the item have its name before theirs (`FOLDER/beer.stackexchange.com.7z`), and their address is
that of the folder. The list comes from strangers: its size is bounded, nothing may be declared in it, and only names
that stay inside the folder of the download are taken from it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit

from lxml import etree

from stackllama.data.download.remote import (
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
from stackllama.data.dump.archive import TABLES
from stackllama.errors import DumpError

LONGEST_LIST = 1 << 24
"""Bytes; the public dump's list has 100,000."""
ENDINGS = (".stackexchange.com", ".com", ".net")
"""What may be left out of a site's name."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_BEGINNING = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*)?<files[\s>]")
_HASHES = {"sha1": re.compile(r"[0-9a-f]{40}"), "md5": re.compile(r"[0-9a-f]{32}")}
_ABSENT = (403, 404, 410)
"""Answers for what is not there: stores of objects say 403 where nobody may look which there are."""

Note = Callable[[str], None]
"""Is told what the user should know while waiting."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A file at an address: its size in bytes, and hashes (algorithm -> hexadecimal) where a list has them.

    `listed` says whether that is from a list. If not, `validator` stands for the present content: a strong ETag, or the
    time of the last change.
    """

    name: str
    url: str
    size: int
    hashes: Mapping[str, str]
    listed: bool = True
    validator: str | None = None


class Place(Protocol):
    """The archives at an address."""

    def get(self, name: str) -> Archive | None:
        """The archive of that file name; None where there is none."""

    def not_found(self, site: str, tried: list[str]) -> DumpError:
        """The error that says so."""


def open_place(address: str, *, patience: Patience, note: Note) -> Place:
    """The archives at `address`, the folder in which they lie.

    Raises RecipeError for an address that cannot be used, and DumpError where the server cannot be reached, or its list
    cannot be read.
    """
    address = check_address(address)
    for url, folder in _lists(address):
        content = _read_list(url, patience, note)
        if content is not None:
            return _listed(address, url, folder, content)
    return UnlistedPlace(address, patience, note)


def find(place: Place, site: str) -> list[Archive]:
    """The archives of a site: one, or the four of a site whose tables lie in archives of their own.

    site: its address (`beer.stackexchange.com`), that without the ending (`beer`), or an archive's name. Raises
    DumpError where there is none.
    """
    stem = site.removesuffix(".7z")
    if not _NAME.fullmatch(stem) or ".." in stem:
        raise DumpError(f"{site!r} is no name of a site; give one such as beer.stackexchange.com")
    tried = []
    for spelled in [stem] if stem.endswith(ENDINGS[1:]) else [stem, *(stem + ending for ending in ENDINGS)]:
        whole, *tables = f"{spelled}.7z", *(f"{spelled}-{table}.7z" for table in TABLES)
        if archive := place.get(whole):
            return [archive]
        if posts := place.get(tables[0]):
            return [posts, *(found for name in tables[1:] if (found := place.get(name)))]
        tried += [whole, tables[0]]
    raise place.not_found(site, tried)


class ListedPlace:
    """Archives of which a list says size and hash."""

    def __init__(self, address: str, archives: Mapping[str, Archive], refused: int) -> None:
        self.archives = archives  # by name, in its order
        self.refused = refused  # how many have a name that is not used
        self._address = address

    def get(self, name: str) -> Archive | None:
        """The archive of that name."""
        return self.archives.get(name)

    def not_found(self, site: str, tried: list[str]) -> DumpError:  # noqa: ARG002 - as the protocol has it
        """The error, with the nearest names."""
        short = {_short(name): _site(name) for name in self.archives}
        near = difflib.get_close_matches(_short(site), short, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(short[name] for name in near)}?" if near else "--list has all that are there"
        return DumpError(f"{self._address} has no archive of {site}; {hint}")


class UnlistedPlace:
    """Archives of which nothing is known but what the server says when it is asked for one."""

    def __init__(self, address: str, patience: Patience, note: Note) -> None:
        self._address = address
        self._patience = patience
        self._note = note

    def get(self, name: str) -> Archive | None:
        """The archive of that name, if the server has it."""
        url, tries = f"{self._address}/{name}", Tries(self._patience, self._note)
        while True:
            try:
                with closing(connect(url, timeout=self._patience.timeout)) as response:
                    size = size_of(response, url)
                    return Archive(name, url, size, {}, listed=False, validator=validator_of(response))
            except StatusError as error:
                if error.status in _ABSENT:
                    return None
                raise
            except BrokenError as error:
                tries.failed(error)

    def not_found(self, site: str, tried: list[str]) -> DumpError:
        """The error, with what was tried."""
        return DumpError(
            f"{self._address} has no archive of {site}, or does not give it out: there is no {', '.join(tried)}; it "
            "has no list of what is there either, so give the archive's name in full, or another --address"
        )


def _lists(address: str) -> list[tuple[str, str]]:
    """Where the list may be, and the folder that stands before the names in it: of an item, of a folder in one."""
    parent, _, last = address.rpartition("/")
    found = [(f"{address}/{last}_files.xml", "")]
    item = parent.rpartition("/")[2]
    if urlsplit(parent).path:
        found.append((f"{parent}/{item}_files.xml", f"{unquote(last)}/"))
    return found if urlsplit(address).path else []


def _read_list(url: str, patience: Patience, note: Note) -> bytes | None:
    """The list; None where there is none, but perhaps a page that says so."""
    tries = Tries(patience, note)
    while True:
        try:
            return _read_once(url, patience.timeout)
        except StatusError as error:
            if error.status in _ABSENT:
                return None
            raise
        except UnknownHostError as error:
            raise DumpError(f"{error}; check the address, and that this machine is connected") from error
        except BrokenError as error:
            tries.failed(error)


def _read_once(url: str, timeout: float) -> bytes | None:
    content = b""
    with closing(connect(url, timeout=timeout)) as response:
        for piece in pieces(response, url):
            content += piece
            if len(content) > LONGEST_LIST:
                raise DumpError(f"{url} is longer than {LONGEST_LIST:,} bytes; no list of a dump is")
    return content if _BEGINNING.match(content) else None


def _listed(address: str, url: str, folder: str, content: bytes) -> ListedPlace:
    """What the list says of the archives in `folder` ("" or a name with its slash)."""
    try:  # _BEGINNING has made sure that no DOCTYPE comes before the root, so nothing is declared
        parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
        root = etree.fromstring(content, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise DumpError(f"the list {url} is damaged ({error}); try again later, or give another --address") from error
    archives: dict[str, Archive] = {}
    refused, elsewhere = 0, set()
    for entry in root.iterfind("file"):
        inside = str(entry.get("name", ""))
        name = inside.removeprefix(folder)
        if not inside.startswith(folder) or not name.endswith(".7z"):
            continue
        size = (entry.findtext("size") or "").strip()
        if _NAME.fullmatch(name.partition("/")[0]) and "/" in name:
            elsewhere.add(name.partition("/")[0])
        elif not _NAME.fullmatch(name) or ".." in name or not re.fullmatch("[0-9]{1,18}", size):
            refused += 1
        else:
            archives[name] = Archive(name, f"{address}/{quote(name)}", int(size), _hash_of(entry))
    if not archives:
        there = f"they lie in folders, so give --address {address}/{min(elsewhere)}" if elsewhere else "it has none"
        raise DumpError(f"{url} lists no archive that can be used; {there}")
    return ListedPlace(address, dict(sorted(archives.items())), refused)


def _hash_of(entry: etree._Element) -> dict[str, str]:
    """The best hash that the list has of a file, as {algorithm: hexadecimal}."""
    for algorithm, form in _HASHES.items():
        value = (entry.findtext(algorithm) or "").strip().lower()
        if form.fullmatch(value):
            return {algorithm: value}
    return {}


def _site(name: str) -> str:
    """The site of an archive's name: `stackoverflow.com-Posts.7z` -> `stackoverflow.com`."""
    stem = name.removesuffix(".7z")
    site, _, table = stem.rpartition("-")
    return site if site.endswith(ENDINGS) and table else stem


def _short(name: str) -> str:
    """A site's name without what all have in common, for comparing."""
    site = _site(name)
    return next((site.removesuffix(ending) for ending in ENDINGS if site.endswith(ending)), site).lower()
