"""Downloads an archive so that it is there whole and right, or not at all.

It appears under its name when size and hash are right and it opens as a .7z; before that it is a part (part.py). A
connection that breaks off is taken up again where it stands, by this process or by the next one. The server is asked
to go on only if its file is still the same (If-Range), and it has to say that it does; else it is begun anew.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPResponse
from itertools import chain
from pathlib import Path
from typing import Protocol

from stackllama.data.download.listing import Archive
from stackllama.data.download.part import ENDING, Origin, Part, open_part
from stackllama.data.download.remote import PIECE, BrokenError, Patience, Tries, connect, pieces, size_of, validator_of
from stackllama.data.dump.archive import MAGIC
from stackllama.data.dump.seven_zip import check_archive
from stackllama.errors import DumpError, RunError
from stackllama.files import raise_if_full, readable_size

LONG = 1 << 28
"""Bytes from which on it takes so long to check them that it is shown."""
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")


class Display(Protocol):
    """Shows how far it is: `done` of `total`."""

    total: int
    done: int

    def advance(self, amount_done: int) -> None:
        """Count so many more."""

    def note(self, text: str) -> None:
        """Show a line of its own."""


Show = Callable[[str, int, str, int], AbstractContextManager[Display]]
"""Opens a display: title, total, unit, and what is done already."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where an archive is, whether it `was_there` before, and the names of the hashes that are right."""

    path: Path
    was_there: bool
    hashes: tuple[str, ...]


def fetch(archive: Archive, folder: Path, *, show: Show, patience: Patience, sha256: str | None = None) -> Fetched:
    """Download `archive` into `folder`, or go on with that; what is there and right is kept.

    sha256: what it is to have, beside what its list says. Raises DumpError where the server does not give it or what it
    gives is wrong, and RunError where another file has its name or the disk refuses.
    """
    target = folder / archive.name
    wanted = {**archive.hashes, **({"sha256": sha256} if sha256 else {})}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if was_there := target.exists():
            _check_kept(archive, target, wanted, show)
        else:
            with open_part(target) as part:
                _receive(archive, part, show, patience)
                _check_received(archive, part, wanted, show)
                part.finish(target)
    except OSError as error:  # those of the network are told as what they are before they come here
        raise_if_full(error, target, left=f"what has come is kept in {target.name}{ENDING}")
        raise RunError(f"{target} cannot be written: {error.strerror or error}; choose another folder") from error
    return Fetched(target, was_there, tuple(wanted))


def _receive(archive: Archive, part: Part, show: Show, patience: Patience) -> None:
    """Bring the part to its full size. Raises DumpError where that does not succeed."""
    if part.origin and not part.origin.is_of(archive):
        part.discard()
    with show(archive.name, archive.size, "bytes", part.size) as display:
        tries = Tries(patience, display.note)
        while part.origin is None or part.size < part.origin.size:
            try:
                _receive_some(archive, part, display, patience.timeout)
            except BrokenError as error:
                if error.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    part.discard()
                try:
                    tries.failed(error, arrived=part.size)
                except DumpError as final:
                    raise DumpError(f"{final}; {_kept_words(archive, part)}") from error


def _kept_words(archive: Archive, part: Part) -> str:
    if part.origin is None or not part.size:
        return f"nothing of {archive.name} has come. Give the same command again later, or another --address"
    size = f"{part.size:,} of {part.origin.size:,} bytes"
    return f"{size} are kept in {part.path}. Give the same command again later: it goes on from there"


def _receive_some(archive: Archive, part: Part, display: Display, timeout: float) -> None:
    """Ask for what is missing and write down what comes. Raises BrokenError where that is not all."""
    offset, headers = 0, dict[str, str]()
    if part.origin and part.origin.can_be_told and part.size:
        offset, headers = part.size, {"Range": f"bytes={part.size}-"}
        if part.origin.validator:
            headers["If-Range"] = part.origin.validator
    with closing(connect(archive.url, timeout=timeout, headers=headers)) as response:
        body = pieces(response, archive.url)
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            _check_range(response, part, offset)
        else:
            first = _first(body, archive.url)
            if part.size:
                display.note("begun anew: the server does not go on where it broke off, or its file has changed")
            part.begin(_origin_of(archive, response))
            body = chain([first], body)
        assert part.origin is not None
        _check_space(part)
        display.total = part.origin.size
        for piece in body:
            if part.size + len(piece) > part.origin.size:
                part.discard()
                raise DumpError(f"{archive.url} is longer than it should be; give another --address")
            part.append(piece)
            display.advance(part.size - display.done)
    if part.size < part.origin.size:
        raise BrokenError("the server sends less than it was asked for")


def _check_range(response: HTTPResponse, part: Part, offset: int) -> None:
    """Make sure that the server goes on with the very file, from `offset`. Raises BrokenError, and begins anew, if not.

    Servers are known that heed Range and not If-Range.
    """
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    validator = validator_of(response)
    origin = part.origin
    if not offset or origin is None or found is None or (int(found[1]), int(found[2])) != (offset, origin.size):
        part.discard()
        raise BrokenError("the server sends another part of the file than it was asked for")
    if validator not in (None, origin.validator):  # it may be left out where If-Range has held
        part.discard()
        raise BrokenError("the file on the server has changed")


def _first(body: Iterator[bytes], url: str) -> bytes:
    """The first bytes of a file. Raises DumpError where they do not begin a .7z: before an older part is given up."""
    first = b""
    for piece in body:
        first += piece
        if len(first) >= len(MAGIC):
            break
    if first[: len(MAGIC)] != MAGIC:
        raise DumpError(
            f"{url} is no .7z archive: it begins with {first[:40]!r}, perhaps a page that tells of an error; look at "
            "it in a browser, or give another --address"
        )
    return first


def _origin_of(archive: Archive, response: HTTPResponse) -> Origin:
    """What the whole file is that the server begins to send. Raises DumpError where it is not the one of the list."""
    said = "Content-Length" in response.headers
    size = archive.size if archive.listed and not said else size_of(response, archive.url)
    if archive.listed and size != archive.size:
        raise DumpError(
            f"{archive.url} has {size:,} bytes, where its list says {archive.size:,}: it is being replaced, or "
            "damaged; try again later, or give another --address"
        )
    return Origin(archive.url, size, archive.hashes, validator_of(response))


def _check_space(part: Part) -> None:
    """Raises RunError where the rest of the file does not fit on the disk."""
    assert part.origin is not None
    missing, free = part.origin.size - part.size, shutil.disk_usage(part.path.parent).free
    if missing > free:
        raise RunError(
            f"{readable_size(missing)} are to come, and the disk that holds {part.path.parent} has "
            f"{readable_size(free)} free; free some space, or give another --to"
        )


def _check_kept(archive: Archive, target: Path, wanted: Mapping[str, str], show: Show) -> None:
    """Raises RunError where the file that is there is not the archive."""
    try:
        _check(target, archive.size, wanted, show)
    except DumpError as error:
        raise RunError(
            f"{target} is there and is not what {archive.url} has now ({error}), an older dump perhaps; it is left as "
            "it is: move it away, or give another --to"
        ) from error


def _check_received(archive: Archive, part: Part, wanted: Mapping[str, str], show: Show) -> None:
    """Raises DumpError, and forgets the part, where what came is not the archive."""
    assert part.origin is not None
    try:
        _check(part.path, part.origin.size, wanted, show)
    except DumpError as error:
        part.discard()
        raise DumpError(
            f"{archive.url} came damaged, and was removed: {error}. Give the same command again; if that ends the same "
            "way, the file on the server is not the right one, so give another --address"
        ) from error


def _check(path: Path, size: int, wanted: Mapping[str, str], show: Show) -> None:
    """Raises DumpError where a file has another size or other hashes than those wanted, or is no whole .7z."""
    if (there := path.stat().st_size) != size:
        raise DumpError(f"it has {there:,} bytes, not {size:,}")
    for name, found in _digests(path, wanted, show).items() if wanted else ():
        if found != wanted[name]:
            raise DumpError(f"its {name} is {found}, not {wanted[name]}")
    check_archive(path)


def _digests(path: Path, names: Iterable[str], show: Show) -> dict[str, str]:
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in names}
    title, size = f"{path.name.removesuffix(ENDING)}: checking", path.stat().st_size
    with path.open("rb") as file, show(title, size, "bytes", 0) if size >= LONG else nullcontext() as display:
        while piece := file.read(PIECE):
            for digest in digests.values():
                digest.update(piece)
            if display:
                display.advance(len(piece))
    return {name: digest.hexdigest() for name, digest in digests.items()}
