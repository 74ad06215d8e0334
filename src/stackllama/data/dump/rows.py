"""The rows of one table of a dump, as they stream by.

A table is XML with one `<row .../>` a line under a root that has the table's name. Dumps are big and come from
strangers, so: memory holds some blocks of 2 MB; nothing is ever resolved (a DOCTYPE that only points to an external
file is blanked out before the parser sees it, any other DOCTYPE is refused, so no entity can be declared); only UTF-8
is read, so nothing can hide behind another encoding; a row of more than 4 MB is refused, and so is anything as long
between two rows (the longest row of Stack Exchange has some 100 kB).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from lxml import etree

from stackllama.data.dump.attributes import MOST_FIELDS, Attributes, of_rows, read_plain
from stackllama.errors import DumpError, TruncatedDumpError

BLOCK, CHUNK = 1 << 21, 1 << 18
"""Bytes that are taken apart at once, and that a parser is given at once."""
_PROLOG = 1 << 16
LONGEST = 1 << 22
"""Bytes from the beginning of a row to the next one, at most."""
_BOM = b"\xef\xbb\xbf"
_ROOT = re.compile(rb"<([A-Za-z_][\w.-]*)[\s/>]")
_ENCODING = re.compile(rb"""encoding\s*=\s*["']([^"']*)["']""")
_DOCTYPE = re.compile(rb"""<!DOCTYPE\s+[\w.:-]+(?:\s+(?:SYSTEM|PUBLIC)(?:\s+(?:"[^"]*"|'[^']*')){1,2})?\s*>""")
_PLAIN_PROLOG = re.compile(
    rb'(?:\xef\xbb\xbf)?<\?xml version="1\.0"(?: encoding="(?i:utf-8)")?\?>[ \t\r\n]*<[A-Za-z]+>[ \t\r\n]*'
)
# Within what the parser saw, so it says nothing.
_POSITION = re.compile(r", line \d+, column \d+.*| line \d+", re.DOTALL)
_ROW = re.compile(rb"""<row(?:[^>"']|"[^"]*"|'[^']*')*+>(?:(?<!/>)\s*</row\s*>)?""")


class ByteStream(Protocol):
    """Anything with `read(size)`: a file, a pipe, a member of an archive."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in its table a stream begins, in bytes, and whether the table ends with it.

    A stream that begins behind the table's first byte begins with a row.
    """

    start: int = 0
    last: bool = True


WHOLE = Place()


def rows(stream: ByteStream, *, table: str, allow_truncated: bool = False, place: Place = WHOLE) -> RowReader:
    """The rows of `stream`, which holds the table `table` ("Posts", "Users", ...), or the piece of it that `place`
    tells; iterate over what comes back.

    Raises DumpError where the stream is empty, is no such table or is damaged, and TruncatedDumpError where it ends too
    early, unless `allow_truncated`: then the complete rows come out and `.truncated_at` says where they end.
    """
    return RowReader(stream, table=table, allow_truncated=allow_truncated, place=place)


class RowReader:
    """Which rows does a table hold, and where does it break?

    `complete` counts the rows so far. `truncated_at` is None, or the byte after the last complete row of a cut table.
    """

    def __init__(self, stream: ByteStream, *, table: str, allow_truncated: bool, place: Place) -> None:
        self.table = table
        self.complete = 0
        self.truncated_at: int | None = None
        self._stream = stream
        self._allow_truncated = allow_truncated
        self._place = place
        # What a failure needs to find its place: the bytes since the last complete row began, where they
        # begin in the table, and how many rows begin before them.
        self._kept = b""
        self._kept_at = place.start
        self._rows_before = 0
        self._ahead = b""  # read, and not looked at yet

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Each row as its attributes."""
        for lot in self.lots():
            yield from lot.to_rows()

    def lots(self) -> Iterator[Attributes]:
        """The rows, some thousand at a time. A parser of XML reads the last one, and what is not written as usual."""
        head = self._prolog() if self._place.start == 0 else b""
        prolog = self._root(b"<") if self._place.start else head[: head.find(b"<row")]
        self._ahead = head
        if self._place.start or _PLAIN_PROLOG.fullmatch(prolog):
            if head:
                self._kept, self._ahead = prolog, head[len(prolog) :]
            yield from self._plain()
        else:
            prolog = b""
        yield from self._parsed(prolog, head)

    def _plain(self) -> Iterator[Attributes]:
        """The rows up to the last one, or to where they end that can be read block by block."""
        more = True
        while more and len(self._ahead) <= LONGEST:
            more = self._fill()
            stop = self._ahead.rfind(b"<row")
            if self._ahead.find(b"<row", 1) > LONGEST:  # of no other row of a block so much was read
                break
            if stop > 0:
                block = self._ahead[:stop]
                lot = read_plain(block)
                lots = self._alone(block) if lot is None else [lot]
                if not lots:
                    break
                self._pass(block, sum(lot.rows for lot in lots))
                self._ahead = self._ahead[stop:]
                yield from lots

    def _alone(self, block: bytes) -> list[Attributes]:
        """The rows of a block by a parser; none where it does not stand by itself, as where a comment goes on."""
        place = Place(self._kept_at + len(self._kept), last=False)
        reader = RowReader(io.BytesIO(block), table=self.table, allow_truncated=False, place=place)
        try:
            lots = list(reader._parsed(self._root(b"<"), b""))
        except DumpError:
            return []
        return lots if reader.complete == block.count(b"<row") else []

    def _fill(self) -> bool:
        """Reads a block ahead, from a stream that may give less at a time; whether there was anything."""
        chunks, left = [], BLOCK
        while left > 0 and (chunk := self._stream.read(left)):
            chunks.append(chunk)
            left -= len(chunk)
        self._ahead += b"".join(chunks)
        return bool(chunks)

    def _read(self) -> bytes:
        """The next chunk, of what was read ahead first."""
        if not self._ahead:
            return self._stream.read(CHUNK)
        chunk, self._ahead = self._ahead[:CHUNK], self._ahead[CHUNK:]
        return chunk

    def _pass(self, block: bytes, rows: int) -> None:
        """Remembers the last row of a block that follows what was kept."""
        start = block.rfind(b"<row")
        end = self._kept_at + len(self._kept)
        self.complete += rows
        self._kept, self._kept_at, self._rows_before = block[start:], end + start, self.complete - 1

    def _parsed(self, prolog: bytes, head: bytes) -> Iterator[Attributes]:
        """The rows of the rest of the stream, by a parser that has seen the beginning of the table."""
        # Comments and processing instructions are dropped, so only elements are children of the root.
        parser = etree.XMLPullParser(
            events=("end",),
            encoding="utf-8",
            resolve_entities=False,
            no_network=True,
            load_dtd=False,
            dtd_validation=False,
            huge_tree=False,
            remove_comments=True,
            remove_pis=True,
        )
        failure = self._feed(parser, prolog) if prolog else None
        chunk = self._read()
        while failure is None:
            failure = self._feed(parser, chunk)
            last: etree._Element | None = None
            found: list[dict[str, str]] = []
            for _, element in parser.read_events():
                assert isinstance(element, etree._Element)
                if element.tag.rpartition("}")[2] == "row":  # in whatever namespace
                    self.complete += 1
                    self._check_fields(len(element.attrib))
                    found.append(dict(element.attrib))  # type: ignore[arg-type]  # bytes only in Python 2
                    element.clear()
                last = element
            if found:
                yield of_rows(found)
            if not chunk:
                break
            self._keep(chunk)
            if failure is None:
                _forget(last)
                chunk = self._read()
        if failure is not None:
            self._explain(failure, head)

    def _feed(self, parser: etree.XMLPullParser, chunk: bytes) -> str | None:
        """Gives a parser a chunk, or the end where there is none; what is wrong with it, if anything is."""
        try:
            if chunk:
                parser.feed(chunk)
            else:
                if not self._place.last:
                    parser.feed(self._root(b"</"))
                parser.close()
        except etree.XMLSyntaxError as error:
            return _POSITION.sub("", str(error))
        # It goes on after an entity that nobody declared, but forgets rows.
        errors = parser.feed_error_log.filter_from_errors()
        return _POSITION.sub("", errors[0].message) if errors else None

    def _check_fields(self, count: int) -> None:
        if count > MOST_FIELDS:  # lxml looks for each of them from the first one on
            raise DumpError(
                f"{self.table}.xml has a row of {count} attributes, its row number {self.complete}, and {MOST_FIELDS} "
                "are allowed; it is no table of a dump"
            )

    def _root(self, opening: bytes) -> bytes:
        """The tag of the root, which a piece from the middle of a table lacks."""
        return opening + self.table.lower().encode() + b">"

    def _prolog(self) -> bytes:
        """The first bytes, with a harmless DOCTYPE blanked out; the position of every other byte stays."""
        head = b""
        while len(head) < _PROLOG and (chunk := self._stream.read(_PROLOG - len(head))):
            head += chunk
        name = f"{self.table}.xml"
        if not head.removeprefix(_BOM).strip():
            raise DumpError(f"{name} is empty; give a complete table of a dump")
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:4]:
            raise DumpError(
                f"{name} is not UTF-8, or no text at all: it begins with {head[:8]!r}; dumps are XML in UTF-8"
            )
        position = len(_BOM) if head.startswith(_BOM) else 0
        while True:
            position += len(head) - position - len(head[position:].lstrip())
            if head.startswith((b"<?", b"<!--"), position):
                end = b"?>" if head.startswith(b"<?", position) else b"-->"
                stop = head.find(end, position)
                declared = _ENCODING.search(head, position, max(stop, position))
                if declared and declared[1].lower() not in (b"utf-8", b"utf8", b"us-ascii"):
                    raise DumpError(
                        f"{name} declares the encoding {declared[1][:40].decode('ascii', 'replace')}; dumps are UTF-8"
                    )
                if stop < 0:
                    break
                position = stop + len(end)
            elif head.startswith(b"<!DOCTYPE", position):
                doctype = _DOCTYPE.match(head, position)
                if doctype is None:
                    raise DumpError(
                        f"{name} has a DOCTYPE with declarations of its own; entities are never resolved, and no "
                        "dump needs them: remove the DOCTYPE if you trust the file"
                    )
                head = head[:position] + b" " * len(doctype[0]) + head[doctype.end() :]
            else:
                break
        root = _ROOT.match(head, position)
        if root is None or root[1].decode("latin-1").lower() != self.table.lower():
            raise DumpError(
                f"{name} is not a table of a Stack Exchange dump: its root should be <{self.table.lower()}>, but it "
                f"goes {head[position : position + 40]!r}"
            )
        return head

    def _keep(self, chunk: bytes) -> None:
        """Remembers `chunk`, and forgets what lies before the last complete row.

        A `<` inside an attribute is always escaped, so `<row` in the bytes is the beginning of a row.
        """
        kept = self._kept + chunk
        if len(kept) > LONGEST:
            self._refuse_endless(kept)
        wanted = self.complete - 1  # the number of the last complete row
        if wanted >= self._rows_before:
            start = len(kept)
            for _ in range(kept.count(b"<row") + self._rows_before - wanted):
                start = kept.rfind(b"<row", 0, start)
            if start > 0:
                self._kept_at += start
                self._rows_before = wanted
                kept = kept[start:]
        self._kept = kept

    def _refuse_endless(self, kept: bytes) -> None:
        edges = [0, *(match.start() for match in re.finditer(b"<row", kept)), len(kept)]
        for start, stop in pairwise(edges):
            if stop - start > LONGEST:
                raise DumpError(
                    f"{self.table}.xml has no complete row in {LONGEST} bytes after byte {self._kept_at + start}; it "
                    "is no table of a dump"
                )

    def _explain(self, reason: str, head: bytes) -> None:
        """Tells a cut table (nothing more comes after the break) from a damaged one, and says so or raises."""
        row = _ROW.match(self._kept) if self.complete else None
        if row is not None:
            end = row.end()
        elif self._place.start:
            end = 0
        else:  # no complete row: the break is after the root's own tag
            root = _ROOT.search(head)
            end = head.find(b">", root.start()) + 1 if root else 0
        byte = self._kept_at + end
        name = f"{self.table}.xml"
        if not self._place.last or self._goes_on(self._kept[end:]):
            raise DumpError(
                f"{name} is damaged after byte {byte}, and goes on after that: {reason}; get a fresh copy of the dump"
            )
        if not self._allow_truncated:
            raise TruncatedDumpError(
                f"{name} is cut off: it ends without </{self.table.lower()}>, and its last complete row ends at byte "
                f"{byte}; get a fresh copy, or go on with the complete rows by --allow-truncated",
                byte=byte,
            )
        self.truncated_at = byte

    def _goes_on(self, piece: bytes) -> bool:
        """Whether anything complete follows the break: `piece`, and then the rest of the stream, begin after the last
        complete row.
        """
        closing = re.compile(rb"</" + self.table.lower().encode() + rb"\s*>", re.IGNORECASE)
        begun, tail = 0, b""
        while True:
            begun += (tail[-3:] + piece).count(b"<row")  # three bytes of the past: no row is counted twice
            if begun > 1 or closing.search(tail + piece):
                return True
            tail = (tail + piece)[-64:]
            if not (piece := self._read()):
                return False


def _forget(last: etree._Element | None) -> None:
    """Frees what was handed out and what is no row: all before the newest element, which the parser may still be at."""
    while last is not None and (parent := last.getparent()) is not None:
        del parent[:-1]
        last = parent
