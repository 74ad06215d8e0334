from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import pytest

from stackllama.data.dump.rows import LONGEST, rows
from stackllama.errors import DumpError, TruncatedDumpError
from tests.data.dumps import question, table
from tests.data.mutations.watching import measuring

FIVE = [question(number, Body=f"<p>a > b /> ä {'x' * number}</p>") for number in range(1, 6)]


class OneByteAtATime:
    def __init__(self, content: bytes) -> None:
        self.stream = io.BytesIO(content)

    def read(self, size: int, /) -> bytes:
        return self.stream.read(1)


def read(content: bytes, *, allow_truncated: bool = False, name: str = "Posts") -> list[dict[str, str]]:
    return list(rows(io.BytesIO(content), table=name, allow_truncated=allow_truncated))


def test_rows_come_out_as_they_went_in() -> None:
    assert read(table("Posts", FIVE)) == FIVE


def test_the_size_of_the_pieces_does_not_matter() -> None:
    assert list(rows(OneByteAtATime(table("Posts", FIVE)), table="Posts")) == FIVE


def test_a_table_longer_than_many_chunks_keeps_every_row() -> None:
    many = [question(number, Body="y" * 900) for number in range(1, 3000)]
    assert [row["Id"] for row in read(table("Posts", many))] == [row["Id"] for row in many]


def test_cut_at_any_byte_keeps_exactly_the_rows_before_the_cut() -> None:
    content = table("Posts", FIVE)
    root_ends = content.index(b"<posts>") + len(b"<posts>")
    row_ends = [match.end() - 2 for match in re.finditer(rb"/>\r\n", content)]
    assert len(row_ends) == 5
    whole = content.index(b"</posts>") + len(b"</posts>")
    for cut in range(root_ends, whole):
        reader = rows(io.BytesIO(content[:cut]), table="Posts", allow_truncated=True)
        complete = sum(end <= cut for end in row_ends)
        assert list(reader) == FIVE[:complete], cut
        assert reader.truncated_at == [root_ends, *row_ends][complete], cut
        with pytest.raises(TruncatedDumpError, match="--allow-truncated") as caught:
            read(content[:cut])
        assert caught.value.byte == reader.truncated_at
        assert str(caught.value.byte) in str(caught.value)


def test_the_place_of_a_cut_is_found_far_into_a_table() -> None:
    many = [question(number, Body="ü" * (number % 700)) for number in range(1, 2500)]
    content = table("Posts", many)
    cut = len(content) - 1000
    reader = rows(io.BytesIO(content[:cut]), table="Posts", allow_truncated=True)
    complete = len(list(reader))
    assert reader.truncated_at is not None
    assert content[: reader.truncated_at].endswith(b"/>")
    assert content[: reader.truncated_at].count(b"<row ") == complete
    assert b"/>" not in content[reader.truncated_at : cut]


def test_damage_in_the_middle_is_never_taken_for_a_cut() -> None:
    content = table("Posts", FIVE)
    broken = content.replace(b'PostTypeId="1"', b'PostTypeId="1', 1)
    for allow_truncated in (False, True):
        with pytest.raises(DumpError, match="damaged after byte") as caught:
            read(broken, allow_truncated=allow_truncated)
        assert not isinstance(caught.value, TruncatedDumpError)


def test_trailing_bytes_after_the_root_are_damage() -> None:
    with pytest.raises(DumpError, match="damaged"):
        read(table("Posts", FIVE) + b"<posts>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n ", "is empty"),
        (b"<html><body>Not found</body></html>", "not a table"),
        (b"Id,Score\n1,2\n", "not a table"),
        (b'<?xml version="1.0"?><users></users>', "not a table"),
        (table("Posts", FIVE).decode().encode("utf-16"), "not UTF-8"),
        (b"\x00\x01\x02\x03", "not UTF-8"),
        (b'<?xml version="1.0" encoding="utf-7"?><posts></posts>', "encoding utf-7"),
        (b'<?xml version="1.0"', "not a table"),
    ],
)
def test_what_is_no_table_is_named(content: bytes, message: str) -> None:
    with pytest.raises(DumpError, match=message):
        read(content, allow_truncated=True)


def test_a_doctype_with_a_missing_external_file_is_passed_over() -> None:
    assert read(table("Posts", FIVE, head="\r\n<!DOCTYPE posts SYSTEM 'posts.dtd'>")) == FIVE


def test_an_external_file_is_not_read(tmp_path: Path) -> None:
    dtd = tmp_path / "evil.dtd"
    dtd.write_text('<!ENTITY secret "read"><!ATTLIST row Extra CDATA "added">')
    found = read(table("Posts", FIVE, head=f'<!DOCTYPE posts SYSTEM "{dtd.as_uri()}">'))
    assert found == FIVE  # no attribute was added


@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE posts [<!ENTITY a "boom">]>',
        '<!DOCTYPE posts SYSTEM "x.dtd" [<!ENTITY a "boom">]>',
        '<!DOCTYPE posts [<!ENTITY a SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE posts [<!ENTITY % p SYSTEM "http://localhost/"> %p;]>',
    ],
)
def test_entities_cannot_be_declared(doctype: str) -> None:
    with pytest.raises(DumpError, match="never resolved"):
        read(table("Posts", FIVE, head=doctype))


def test_an_undeclared_entity_is_damage_and_not_silence() -> None:
    for head in ("", "<!DOCTYPE posts SYSTEM 'posts.dtd'>"):
        content = table("Posts", FIVE, head=head).replace(b"a &gt; b", b"a &secret; b", 1)
        with pytest.raises(DumpError, match="damaged"):
            read(content)


def test_an_attribute_without_bound_is_refused() -> None:
    with pytest.raises(DumpError):
        read(table("Posts", [question(1, Body="z" * 11_000_000)]))


def test_a_row_of_very_many_attributes_is_refused_at_once() -> None:
    row = question(3) | {f"a{number}": "" for number in range(300_000)}
    started = time.process_time()
    with pytest.raises(DumpError, match="a row of 300008 attributes, its row number 2, and 200 are allowed"):
        read(table("Posts", [question(1), row]))
    assert time.process_time() - started < 3  # minutes, were each looked for from the first one on


def test_a_row_without_end_is_refused_however_it_is_filled() -> None:
    content = table("Posts", FIVE)
    for fill in (b"<!-- x -->", b"w", b'<y a="b">t</y>'):
        long = content.replace(b" />\r\n  <row", b">" + fill * (6_000_000 // len(fill)) + b"</row>\r\n  <row", 1)
        with pytest.raises(DumpError, match="no complete row in 4194304 bytes"):
            read(long)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")
def test_elements_that_are_no_rows_take_no_memory() -> None:
    long = table("Posts", FIVE).replace(b" />\r\n  <row", b">" + b"<x/>" * 500_000 + b"</row>\r\n  <row", 1)
    with measuring(60) as cost:
        assert [row["Id"] for row in read(long)] == ["1", "2", "3", "4", "5"]
    assert cost.megabytes < 40  # 70 where a row keeps its children


def test_a_long_name_of_an_encoding_is_told_in_short() -> None:
    with pytest.raises(DumpError) as told:
        read(table("Posts", FIVE).replace(b'"utf-8"', b'"' + b"x" * 5000 + b'"'))
    assert len(str(told.value)) < 200


HEAD = b'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n'


@pytest.mark.parametrize("declaration", [b'encodIng="utf-8"', b'ENCODING="utf-8"', b'encoding="UTF-8" x="y"'])
def test_a_declaration_that_xml_does_not_allow_is_damage(declaration: bytes) -> None:
    with pytest.raises(DumpError):
        read(b'<?xml version="1.0" ' + declaration + b'?>\n<posts>\n<row Id="1" />\n</posts>')
    assert read(HEAD.replace(b"utf-8", b"UTF-8") + b'<row Id="1" />\n</posts>') == [{"Id": "1"}]


@pytest.mark.parametrize("edge", [1 << 16, 1 << 18, (1 << 18) + (1 << 16)])
def test_no_row_is_lost_behind_an_undeclared_entity(edge: int) -> None:
    """The parser goes on after such an error, with the rows after its next chunk."""
    content = HEAD.replace(b'"', b"'") + b'<row Id="1" Body="&nbsp;" />\n'
    while edge - len(content) > 2000:
        content += b'<row Id="2" Body="%s" />\n' % (b"x" * 900)
    content += b" " * (edge - len(content)) + b'<row Id="3" />\n'
    with pytest.raises(DumpError, match="nbsp"):
        read(content)
    with pytest.raises(DumpError, match="nbsp"):
        read(content, allow_truncated=True)


def test_a_row_counts_in_whatever_namespace() -> None:
    inside = b'<row Id="1" />\n<row Id="2" />\n</posts>'
    assert [row["Id"] for row in read(HEAD.replace(b"<posts>", b'<posts xmlns="u">') + inside)] == ["1", "2"]
    strange = HEAD + b'<row Id="0" />' + inside.replace(b'Id="1"', b'xmlns="u" Id="1"')
    assert [row["Id"] for row in read(strange)] == ["0", "1", "2"]


@pytest.mark.parametrize("before", [0, 100, 1000, 2000, 3000])
@pytest.mark.parametrize("odd", [b"", b"<!-- -->\n"])
def test_a_row_that_is_too_long_is_refused_wherever_it_lies(before: int, odd: bytes) -> None:
    usual = b'<row Id="1" Body="%s" />\n' % (b"x" * 990)
    for size, fits in ((LONGEST - 300_000, True), (LONGEST + 1000, False), (5_500_000, False)):
        long = b'<row Id="2" Body="%s" />\n' % (b"x" * size)
        content = HEAD + usual * before + odd + long + usual * 3 + b"</posts>"
        if fits:
            assert len(read(content)) == before + 4
        else:
            with pytest.raises(DumpError, match="no complete row in 4194304 bytes"):
                read(content)


def test_a_row_in_a_comment_is_no_row() -> None:
    comment = b'<!-- <row Id="2" /> -->\n'
    for content in (
        HEAD + b'<row Id="1" />\n' + comment + b'<row Id="3" />\n</posts>',
        HEAD
        + b'<row Id="1" />\n'
        + comment.replace(b"/> -->", b'/>\n<row Id="4" /> -->')
        + b'<row Id="3" />\n</posts>',
        HEAD + comment + b'<row Id="1" />\n<row Id="3" />\n</posts>',
    ):
        assert [row["Id"] for row in read(content)] == ["1", "3"]
