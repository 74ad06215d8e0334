from __future__ import annotations

from stackllama.data.text.markdown_blocks import joined, listed, prefixed, quoted, table


def test_prefixes_leave_no_white_space_on_empty_lines() -> None:
    assert prefixed("a\n\n  b", "- ", "  ") == "- a\n\n    b"
    assert prefixed("", "> ", "> ") == ">"


def test_a_list_follows_text_at_once_only_where_a_reader_begins_it_there() -> None:
    text = ("text", "a")
    assert joined([text, ("-", "- b")], tight=True) == "a\n- b"
    assert joined([text, (".", "1. b")], tight=True) == "a\n1. b"
    assert joined([text, (".", "2. b")], tight=True) == "a\n\n2. b"
    assert joined([text, ("-", "- b")], tight=False) == "a\n\n- b"


def test_lists_beside_each_other_take_turns_with_their_signs() -> None:
    items = [("item", "a"), ("item", "b\nc")]
    assert listed(items, None, "", loose=False) == [("-", "- a\n- b\n  c")]
    assert listed(items, None, "-", loose=False) == [("*", "* a\n* b\n  c")]
    assert listed(items, "9", ".", loose=True) == [(")", "9) a\n\n10) b\n    c")]
    assert listed(items, "x", "-", loose=False) == [(".", "1. a\n2. b\n   c")]


def test_what_stands_outside_the_items_of_a_list_goes_before_it_or_into_an_item() -> None:
    text, item = ("text", "a"), ("item", "b")
    assert listed([text, item, text], None, "", loose=False) == [text, ("-", "- b\n\n  a")]
    assert listed([text], None, "", loose=False) == [text]


def test_a_spoiler_is_a_quote_that_begins_with_its_sign() -> None:
    assert quoted([("text", "a"), ("text", "b")], spoiler=True) == ">! a\n>\n> b"
    assert quoted([("-", "- a")], spoiler=True) == ">!\n>\n> - a"
    assert quoted([("text", "a")], spoiler=False) == "> a"


def test_a_table_needs_cells_of_one_line() -> None:
    cell, block = [("text", "a|b")], [("block", "```\nc\n```")]
    assert table([[cell, []], [cell]]) == [("block", "| a\\|b |  |\n| --- | --- |\n| a\\|b |  |")]
    assert table([[cell, block]]) == [*cell, *block]
    assert table([]) == []
