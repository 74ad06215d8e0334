"""A block of rows is taken apart as a parser of XML would, or not at all."""

from __future__ import annotations

import io
import random
import tracemalloc
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from stackllama.data.dump.attributes import MOST_FIELDS, of_rows, read_plain
from stackllama.data.dump.rows import rows
from tests.data.dumps import question, shared_dumps, table

USUAL = b"""  <row Id="1" Body="&lt;p&gt;a &amp;amp; &quot;b&quot;&#xA;&#xD;&#x9;c&lt;/p&gt;" />\r
  <row Id="2" Tags="" />
"""


def parsed(block: bytes) -> list[dict[str, str]] | None:
    """What a parser of XML says of a block; None where it is no XML."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, remove_comments=True, huge_tree=True)
    try:
        root = etree.fromstring(b"<posts>" + block + b"</posts>", parser)
    except etree.XMLSyntaxError:
        return None
    return [dict(row.attrib) for row in root]  # type: ignore[arg-type]


def read(block: bytes) -> list[dict[str, str]] | None:
    found = read_plain(block)
    return None if found is None else found.to_rows()


def test_rows_as_they_are_written() -> None:
    assert read(USUAL) == parsed(USUAL) == [{"Id": "1", "Body": '<p>a &amp; "b"\n\r\tc</p>'}, {"Id": "2", "Tags": ""}]


def test_a_column_has_every_row() -> None:
    found = read_plain(USUAL)
    assert found is not None
    assert found.rows == 2
    assert found.column("Id").to_pylist() == ["1", "2"]
    assert found.column("Tags").to_pylist() == [None, ""]
    assert found.column("Score").to_pylist() == [None, None]


def test_rows_read_one_by_one_make_the_same_columns() -> None:
    by_rows, at_once = of_rows(parsed(USUAL) or []), read_plain(USUAL)
    assert at_once is not None
    assert by_rows.rows == 2
    assert by_rows.to_rows() == at_once.to_rows()
    for name in ("Id", "Body", "Tags", "Score"):
        assert by_rows.column(name).equals(at_once.column(name))
    assert of_rows([]).column("Id").to_pylist() == []


def test_entities_are_resolved_once() -> None:
    block = b'<row Body="&amp;lt;b&amp;gt; &amp;amp;amp; &amp;#xA; &lt;&gt;&quot;&amp;" Id="3"/>'
    assert read(block) == parsed(block) == [{"Body": '&lt;b&gt; &amp;amp; &#xA; <>"&', "Id": "3"}]


def test_a_tab_that_was_not_written_as_a_number_is_a_space() -> None:
    block = b'<row Id="1"\tBody="a\tb&#x9;c" />\t\n'
    assert read(block) == parsed(block) == [{"Id": "1", "Body": "a b\tc"}]


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"<row />",
        b"<row Id='1' />",
        b'<row Id = "1" />',
        b'<row Id="1"></row>',
        b'<row Id="1"><x/></row>',
        b'<row Id="1" Body="a\nb" />',
        b'<row Id="1" Body="&#65;" />',
        b'<row Id="1" Body="&apos;" />',
        b'<row Id="1" a:b="2" />',
        b'<row xmlns="x" Id="1" />',
        b'<!-- --><row Id="1" />',
        b'<row Id="1" /><!-- <row Id="2" /> -->',
        b'<row Id="1" /> text <row Id="2" />',
        b'<row Id="1" /><roww Id="2" />',
        b'<row Id="1" Body="a\r=" Tags="" />',
    ],
)
def test_what_is_written_otherwise_is_left_to_a_parser(block: bytes) -> None:
    assert read_plain(block) is None


@pytest.mark.parametrize(
    "block",
    [
        b'<row Id="1" Id="2" />',
        b'<row Id="1" Body="<" />',
        b'<row Id="1" Body="&" />',
        b'<row Id="1" Body="&lt" />',
        b'<row Id="1" Body="&nbsp;" />',
        b'<row Id="1" Body="\x00" />',
        b'<row Id="1" Body="\x01" />',
        b'<row Id="1" Body="\xff" />',
        b'<row Id="1"Body="2" />',
        b'<row Id="1" / >',
        b'<row Id="1" ',
        b'<row Id="1',
        b'<row Id="1" /><row Id="2" /',
        b'<row Id="1" Body="a\r="&#xA;Tags="" />',
        b'<row Id="1" Body="' + "\ufffe".encode() + b'" />',
    ],
)
def test_what_is_no_xml_is_not_read(block: bytes) -> None:
    assert parsed(block) is None
    assert read_plain(block) is None


@pytest.mark.parametrize("block", [b'Id="1" />', b'/><row Id="1" />', b'<row Id="1" /><row Id="2" />&amp;'])
def test_what_begins_or_ends_with_anything_but_a_row_is_not_read(block: bytes) -> None:
    assert read_plain(block) is None


def test_a_row_of_very_many_attributes_is_left_to_whoever_counts_them() -> None:
    row = "<row " + " ".join(f'A{number}="1"' for number in range(MOST_FIELDS)) + "{} />"
    assert read_plain(row.format("").encode()) is not None
    assert read_plain(row.format(' B="1"').encode()) is None


PARTS = [
    b"<row",
    b" ",
    b"\n",
    b"\t",
    b"Id",
    b"Body",
    b'="',
    b'"',
    b"/>",
    b"a",
    b"&lt;",
    b"&amp;",
    b"&quot;",
    b"&",
    b";",
]
PARTS += [b"<", b">", b"'", b"lt;", b"\xc3\xa4", b"\xff", b"\x00", b"&#xA;", b"&#x", b"<!--", b"-->", b' Id="1"']
PARTS += [b"\r"]


@given(st.lists(st.sampled_from(PARTS), max_size=30).map(b"".join))
def test_whatever_is_read_is_what_a_parser_reads(block: bytes) -> None:
    for whole in (block, b'<row Id="1" ' + block + b" />", b'<row Body="' + block + b'" />'):
        found = read(whole)
        assert found is None or found == parsed(whole)


@given(st.integers(0, 2**32))
def test_a_byte_that_is_changed_is_read_as_a_parser_reads_it(seed: int) -> None:
    chance = random.Random(seed)
    block = bytearray(USUAL * 3)
    for _ in range(chance.randrange(1, 4)):
        block[chance.randrange(len(block))] = chance.choice([*b'"<>&;/ \n\tIa=#\x00\xff', chance.randrange(256)])
    found = read(bytes(block))
    assert found is None or found == parsed(bytes(block))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\ufffe\uffff", min_codepoint=32)), max_size=5))
def test_any_text_comes_out_as_it_went_in(texts: list[str]) -> None:
    written = [{"Id": str(number), "Body": text} for number, text in enumerate(texts)]
    lines = [f'<row Id="{row["Id"]}" Body="{escape(row["Body"], {chr(34): "&quot;"})}" />' for row in written]
    assert (read("\n".join(lines).encode()) or []) == written


def test_real_dumps_are_read_without_a_parser_but_for_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """All shared tables of posts, byte by byte what a parser reads."""
    for path in sorted(shared_dumps().glob("*/Posts.xml")):
        reader = rows(io.BytesIO(path.read_bytes()), table="Posts", allow_truncated=True)
        found = list(reader)
        monkeypatch.setattr("stackllama.data.dump.rows.read_plain", lambda _: None)
        assert found == list(rows(io.BytesIO(path.read_bytes()), table="Posts", allow_truncated=True)), path
        monkeypatch.undo()


def test_behind_a_block_for_a_parser_reading_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [question(number, Body="y" * 900) for number in range(1, 9000)]
    content = table("Posts", many).replace(b'Id="10"', b"Id='10'", 1)
    asked: list[bool] = []

    def watched(block: bytes) -> object:
        found = read_plain(block)
        asked.append(found is not None)
        return found

    monkeypatch.setattr("stackllama.data.dump.rows.read_plain", watched)
    assert list(rows(io.BytesIO(content), table="Posts")) == many
    assert asked[0] is False
    assert len(asked) > 3
    assert all(asked[1:])


def test_what_no_dump_has_between_values_is_left_to_a_parser() -> None:
    """Or it would be remembered."""
    near = b'<row Id="1" />\n<row Id="2" />'
    gaps = [b" " * (number % 190) + b"\n" * (1 + number // 190) for number in range(1200)]
    varied = b"".join(b'<row Id="1" />' + gap for gap in gaps)
    for block in (near.replace(b"\n", b" " * 300), near + b" " * 300, varied):
        assert read_plain(block) is None
    assert read_plain(near) is not None


def test_many_names_take_no_place_for_every_row() -> None:
    block = b"".join(b'<row A%d="" />' % number for number in range(990)) + b'<row A="" />' * 100_000
    tracemalloc.start()
    assert read_plain(block) is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
