"""What can happen to the bytes of any file."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

PIECES = (
    *(b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80" * 5, b"\xf8\x88\x80\x80\x80"),
    *(b"\0", b"\0" * 100, b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n\n", b"<", b">", b'"', b"'", b"&", b"\x1b", b"\x1a"),
    *(b"<row ", b"/>", b"</posts>", b"PAR1", b"7z\xbc\xaf\x27\x1c", b"{", b"}", b"[" * 50, b"\\u0000", b"\xff" * 64),
)


def cut(rng: Random, content: bytes) -> bytes:
    return content[: rng.randint(0, len(content))]


def cut_a_little(rng: Random, content: bytes) -> bytes:
    return content[: -rng.randint(1, 40)]


def headless(rng: Random, content: bytes) -> bytes:
    return content[rng.randint(0, min(len(content), 4000)) :]


def flipped(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 50)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def other_bytes(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.choice(
            (0, 9, 10, 13, 34, 38, 39, 47, 60, 62, 127, 128, 192, 254, 255)
        )
    return bytes(changed)


def inserted(rng: Random, content: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 5))):
        at = rng.randint(0, len(content))
        content = content[:at] + rng.choice(PIECES) + content[at:]
    return content


def deleted(rng: Random, content: bytes) -> bytes:
    at = rng.randint(0, len(content))
    return content[:at] + content[at + rng.choice((1, 1, 2, 7, 100)) :]


def doubled(rng: Random, content: bytes) -> bytes:
    start, stop = sorted(rng.randint(0, len(content)) for _ in range(2))
    return content[:stop] + content[start:stop] * rng.choice((1, 1, 30)) + content[stop:]


def swapped(rng: Random, content: bytes) -> bytes:
    one, two, three = sorted(rng.randint(0, len(content)) for _ in range(3))
    return content[:one] + content[two:three] + content[one:two] + content[three:]


def blotted(rng: Random, content: bytes) -> bytes:
    at = rng.randint(0, len(content))
    size = rng.choice((1, 16, 300))
    return content[:at] + bytes([rng.choice((0, 32, 255))]) * size + content[at + size :]


def noise(rng: Random, content: bytes) -> bytes:
    at = rng.randint(0, len(content))
    size = rng.choice((4, 64, 400))
    return content[:at] + rng.randbytes(size) + content[at + size :]


def nearly_nothing(rng: Random, content: bytes) -> bytes:
    return rng.choice(
        (b"", b"\n", b"\xef\xbb\xbf", b"\0", b" " * 5000, b"\0" * 100_000, content[:1], content[:6], content[:32])
    )


def more_at_the_end(rng: Random, content: bytes) -> bytes:
    return content + rng.choice((*PIECES, rng.randbytes(500), b"\0" * 70_000))


RAW: dict[str, Callable[[Random, bytes], bytes]] = {
    one.__name__: one
    for one in (
        *(cut, cut_a_little, headless, flipped, other_bytes, inserted, deleted, doubled, swapped, blotted, noise),
        *(nearly_nothing, more_at_the_end),
    )
}
