"""What can be wrong with an archive: names, kinds and sizes of members, bombs, its table of contents."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.data.mutations.bodies import text
from tests.data.mutations.raw import RAW
from tests.data.mutations.seven import (
    FILE,
    FOLDER,
    JUNCTION,
    METHODS,
    SOCKET,
    SYMLINK,
    WINDOWS_FOLDER,
    Contents,
    Member,
    written,
)

NAMES = (
    *(
        "../Posts.xml",
        "a/../../Posts.xml",
        "/Posts.xml",
        "/etc/passwd",
        "C:\\Posts.xml",
        "c:Posts.xml",
        "..\\Posts.xml",
    ),
    *(
        "\\\\server\\share\\Posts.xml",
        "../canary.xml",
        "",
        ".",
        "..",
        "/",
        "a/",
        "//",
        "Posts.xml/",
        "./Posts.xml",
        "a/Posts.xml",
    ),
    *(
        "posts.XML",
        "POSTS.xml",
        "Posts.xml ",
        "Posts.xml.",
        "Posts.xml::$DATA",
        "Posts",
        "Users.xml",
        "Posts.xml\n",
        "\x1b[2J.xml",
    ),
    *(
        "x" * 300 + ".xml",
        "x/" * 2000 + "Posts.xml",
        "\ud800.xml",
        "Pösts.xml",
        "\u202elmx.stsoP",
        "~/Posts.xml",
        "CON.xml",
        "-rf.xml",
    ),
)


def honest(tables: dict[str, bytes], rng: Random) -> Contents:
    """The tables among others, in one block or in a block each."""
    members = [Member(f"{name}.xml", content) for name, content in tables.items()]
    members.insert(rng.randint(0, len(members)), Member("Badges.xml", b"<badges></badges>"))
    blocks = [members] if rng.random() < 0.6 else [[one] for one in members if one.content]
    return Contents(
        blocks or [members],
        rng.choice(("lzma2", "lzma2", "lzma", "bzip2", "copy", "ppmd")),
        packed_table=rng.random() < 0.6,
    )


def _one(rng: Random, contents: Contents) -> Member:
    return rng.choice(contents.members or [Member("x", b"x")])


def other_names(rng: Random, contents: Contents) -> None:
    for _ in range(rng.choice((1, 1, 3))):
        _one(rng, contents).name = rng.choice((*NAMES, text(rng), _one(rng, contents).name))


def other_kinds(rng: Random, contents: Contents) -> None:
    for _ in range(rng.choice((1, 1, 3))):
        kinds = (SYMLINK, SOCKET, FOLDER, WINDOWS_FOLDER, JUNCTION, 0, 1, 0xFFFFFFFF, 0x400, FILE | 0x10)
        _one(rng, contents).attributes = rng.choice((*kinds, rng.randrange(2**32)))


def links(rng: Random, contents: Contents) -> None:
    """Symbolic links as members, which lead outside."""
    target = rng.choice((b"../canary.xml", b"/etc/passwd", b"..", b"Posts.xml", b"\0", b"x" * 5000))
    member = Member(
        rng.choice(("Posts.xml", "Users.xml", "a.xml", "link")), target, attributes=rng.choice((SYMLINK, JUNCTION))
    )
    if rng.random() < 0.5:
        contents.blocks[:] = [[one for one in block if one.name != member.name] for block in contents.blocks]
    contents.blocks.insert(0, [member])


def again(rng: Random, contents: Contents) -> None:
    one = _one(rng, contents)
    name = rng.choice((one.name, one.name.upper(), f"a/{one.name}", f"{one.name}_0"))
    rng.choice(contents.blocks or [[]]).append(Member(name, rng.choice((one.content, b"", b"x"))))


def wrong_sizes(rng: Random, contents: Contents) -> None:
    size = rng.choice(
        (0, 1, 5, 100_000, 2**20, 2**28 - 1, 2**28 + 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1, 2**64 - 100)
    )
    if rng.random() < 0.5:
        contents.block_size = size
    else:
        _one(rng, contents).size = size
        if rng.random() < 0.5:
            contents.block_size = rng.choice((size, size + 1, size - 1, 300))


def wrong_sums(rng: Random, contents: Contents) -> None:
    _one(rng, contents).checksum = rng.choice((0, 1, 2**32 - 1))


def other_method(rng: Random, contents: Contents) -> None:
    contents.method = rng.choice(sorted(METHODS))
    if rng.random() < 0.3:
        contents.table_method, contents.packed_table = rng.choice(sorted(METHODS)), True


def claimed_method(rng: Random, contents: Contents) -> None:
    """The bytes are packed by another method than the one that is named."""
    for one in contents.members:
        one.content = METHODS[rng.choice(("copy", "lzma2", "bzip2"))][2](one.content) or b"x"


def wrong_counts(rng: Random, contents: Contents) -> None:
    what = rng.choice(("files", "folders", "streams", "name bytes"))
    contents.numbers[what] = rng.choice((0, 1, 2, 3, 7, 100, 70_000, 2**23, 2**31, 2**32, 2**63, 2**64 - 1))


def damaged_table(rng: Random, contents: Contents) -> None:
    """The table of contents is damaged, and its checksum is right all the same."""
    name, seed = rng.choice(sorted(RAW)), rng.random()
    contents.change_table = lambda table: RAW[name](Random(seed), table)
    contents.packed_table = rng.random() < 0.3


def padded_table(rng: Random, contents: Contents) -> None:
    contents.padding, contents.packed_table = rng.choice((1, 1000, 300_000)), rng.random() < 0.7


def no_members(rng: Random, contents: Contents) -> None:
    contents.blocks[:] = rng.choice(
        ([], [[]], [[Member("Posts.xml", b"")]], [[Member("Posts.xml", b""), Member("Users.xml", b"x")]])
    )


def many_members(rng: Random, contents: Contents) -> None:
    count = rng.choice((50, 1000, 9000))
    contents.blocks.append(
        [Member(rng.choice(("{}.xml", "{}", "a/{}.xml")).format(n), rng.choice((b"", b"x"))) for n in range(count)]
    )


def archive_inside(rng: Random, contents: Contents) -> None:
    inner = written(Contents([list(contents.members)], "copy"))
    contents.blocks.append([Member(rng.choice(("Posts.7z", "Users.xml.7z", "inner.xml")), inner)])
    if rng.random() < 0.5:
        _one(rng, contents).content = inner


def bomb(rng: Random, contents: Contents) -> None:
    """Few bytes that unpack to very many: of zeros, of spaces, of rows."""
    size = rng.choice((1 << 22, 30 << 20, 70 << 20, 300 << 20))
    fill = rng.choice((b"\0", b" ", b'<row Id="1" PostTypeId="3" />\r\n', b"<x/>", b"<row a='", b"<row\n"))
    one = _one(rng, contents)
    one.content = (
        one.content[: len(one.content) // 2] + fill * (size // len(fill)) + one.content[len(one.content) // 2 :]
    )
    contents.method = rng.choice(("lzma2", "lzma2", "lzma", "bzip2", "zstd", "deflate"))
    if rng.random() < 0.3:
        contents.block_size = 1000


def table_bomb(rng: Random, contents: Contents) -> None:
    """A table of contents that unpacks to very many bytes, or claims millions of members."""
    contents.packed_table, contents.table_method = True, rng.choice(("lzma2", "lzma", "zstd", "deflate"))
    count = rng.choice((100_000, 1_500_000))
    if rng.random() < 0.5:
        contents.padding = count * 20
    else:
        contents.change_table = lambda table: (
            b"\1\5\xff"
            + count.to_bytes(8, "little")
            + b"\x11\xff"
            + (2 * count + 1).to_bytes(8, "little")
            + bytes(2 * count + 1)
            + b"\0\0"
        )


ARCHIVES: dict[str, Callable[[Random, Contents], None]] = {
    one.__name__: one
    for one in (
        *(other_names, other_kinds, links, again, wrong_sizes, wrong_sums, other_method, claimed_method, wrong_counts),
        *(damaged_table, damaged_table, padded_table, no_members, many_members, archive_inside),
    )
}
HUGE_ARCHIVES: dict[str, Callable[[Random, Contents], None]] = {"bomb": bomb, "table_bomb": table_bomb}
