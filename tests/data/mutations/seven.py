"""A writer of .7z archives that can lie: about sizes, checksums, kinds of members, methods, its table of contents.

Format: 7zFormat.txt of the LZMA SDK. py7zr, which reads archives here, writes honest ones only.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from struct import pack as packed

import pyarrow as pa

MAGIC = b"7z\xbc\xaf\x27\x1c\x00\x04"
SYMLINK, SOCKET, FILE, FOLDER = (kind << 16 | 0x8000 for kind in (0o120777, 0o140777, 0o100644, 0o040755))
WINDOWS_FOLDER, JUNCTION = 0x10, 0x410


@dataclass
class Member:
    """A member of an archive; `size` and `checksum` are claims, None for the truth."""

    name: str
    content: bytes
    size: int | None = None
    checksum: int | None = None
    attributes: int = FILE


@dataclass
class Contents:
    """What an archive is made of: blocks of members that are packed together, and what it says beside the truth.

    `block_size` is what a block unpacks to; `numbers` go into the table of contents instead of the right ones ("files",
    "folders", "streams", "name bytes"); `padding` makes the table longer by so many bytes.
    """

    blocks: list[list[Member]]
    method: str = "lzma2"
    block_size: int | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    packed_table: bool = True
    table_method: str = "lzma2"
    padding: int = 0
    change_table: Callable[[bytes], bytes] | None = None

    @property
    def members(self) -> list[Member]:
        return [member for block in self.blocks for member in block]


def _lzma(content: bytes, kind: int) -> bytes:
    return lzma.compress(content, lzma.FORMAT_RAW, filters=[{"id": kind, "preset": 1, "dict_size": 1 << 16}])


def _deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(content) + packer.flush()


METHODS: dict[str, tuple[bytes, bytes | None, Callable[[bytes], bytes]]] = {
    "copy": (b"\0", None, bytes),
    "lzma": (b"\3\1\1", b"\x5d" + packed("<L", 1 << 16), lambda content: _lzma(content, lzma.FILTER_LZMA1)),
    "lzma2": (b"\x21", b"\x08", lambda content: _lzma(content, lzma.FILTER_LZMA2)),
    "lzma2 of 4 GB": (b"\x21", b"\x28", lambda content: _lzma(content, lzma.FILTER_LZMA2)),
    "bzip2": (b"\4\2\2", None, bz2.compress),
    "ppmd": (b"\3\4\1", b"\6" + packed("<L", 1 << 20), bytes),
    "deflate": (b"\4\1\x08", None, _deflated),
    "zstd": (b"\4\xf7\x11\1", b"\1\5\0", lambda content: bytes(pa.compress(content, "zstd", asbytes=True))),
    "unknown": (b"\x7f\x7f", None, bytes),
    "encrypted": (b"\6\xf1\7\1", b"\x13\0", bytes),
}
"""Name -> the method's id and properties, and what packs."""


def written(contents: Contents) -> bytes:
    """The archive."""
    packs = [METHODS[contents.method][2](b"".join(one.content for one in block)) for block in contents.blocks]
    body = b"".join(packs)
    table = _table(contents, packs) + bytes(contents.padding)
    if contents.change_table:
        table = contents.change_table(table)
    if contents.packed_table:
        lump = METHODS[contents.table_method][2](table)
        start = len(body)
        body += lump
        table = b"\x17" + _streams(start, [lump], [len(table)], contents.table_method, zlib.crc32(table)) + b"\0"
    ends = packed("<QQL", len(body), len(table), zlib.crc32(table))
    return MAGIC + packed("<L", zlib.crc32(ends)) + ends + body + table


def number(value: int) -> bytes:
    """A whole number as 7z has it; eight bytes of it for one that is negative."""
    return packed("B", value) if 0 <= value < 0x80 else b"\xff" + packed("<Q", value % 2**64)


def _streams(
    start: int,
    packs: Sequence[bytes],
    sizes: Sequence[int],
    method: str,
    checksum: int | None = None,
    folders: int | None = None,
) -> bytes:
    """Where the packed bytes are, and how they unpack."""
    identity, properties, _ = METHODS[method]
    coder = bytes([len(identity) | (0x20 if properties is not None else 0)]) + identity
    coder += number(len(properties)) + properties if properties is not None else b""
    found = b"\6" + number(start) + number(len(packs)) + b"\x09" + b"".join(number(len(one)) for one in packs) + b"\0"
    found += b"\7\x0b" + number(len(packs) if folders is None else folders) + b"\0" + (b"\1" + coder) * len(packs)
    found += b"\x0c" + b"".join(map(number, sizes))
    return found + (b"\x0a\1" + packed("<L", checksum) if checksum is not None else b"") + b"\0"


def _table(contents: Contents, packs: Sequence[bytes]) -> bytes:
    there = [[one for one in block if one.content or one.size] for block in contents.blocks]
    totals = [sum(len(one.content) for one in block) for block in contents.blocks]
    totals = totals if contents.block_size is None else [contents.block_size] * len(totals)
    found = b"\1\4" + _streams(0, packs, totals, contents.method, folders=contents.numbers.get("folders"))
    found += b"\x08\x0d" + b"".join(number(contents.numbers.get("streams", len(block))) for block in there)
    claims = [len(one.content) if one.size is None else one.size for block in there for one in block[:-1]]
    found += b"\x09" + b"".join(map(number, claims)) if claims else b""
    sums = [zlib.crc32(one.content) if one.checksum is None else one.checksum for block in there for one in block]
    found += b"\x0a\1" + b"".join(packed("<L", one) for one in sums) + b"\0\0" if sums else b"\0\0"
    return found + _files(contents) + b"\0"


def _files(contents: Contents) -> bytes:
    members = contents.members
    found = b"\5" + number(contents.numbers.get("files", len(members)))
    bits = "".join("0" if one.content or one.size else "1" for one in members)
    if "1" in bits:
        flags = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
        found += b"\x0e" + number(len(flags)) + flags
    names = b"\0" + b"".join((one.name + "\0").encode("utf-16-le", "surrogatepass") for one in members)
    found += b"\x11" + number(contents.numbers.get("name bytes", len(names))) + names
    kinds = b"\1\0" + b"".join(packed("<L", one.attributes % 2**32) for one in members)
    return found + b"\x15" + number(len(kinds)) + kinds + b"\0"
