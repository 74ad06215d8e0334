from __future__ import annotations

import pytest

from stackllama.report.layout import TEXT_LIMIT, clipped, is_web, pictured


def test_control_characters_and_turning_signs_are_shown() -> None:
    assert pictured("a\x00\x1b\x7f\x85\u202eb\u2069\n\tc") == "a␀␛␡[U+0085][U+202E]b[U+2069]\n\tc"
    assert pictured("שלום, 日本, \u00a0é, 👩\u200d🚀") == "שלום, 日本, \u00a0é, 👩\u200d🚀"


@pytest.mark.parametrize("url", ["https://a.b/c", "http://a.b"])
def test_web_addresses(url: str) -> None:
    assert is_web(url)


@pytest.mark.parametrize(
    "url", ["", "javascript:alert(1)", "//a.b", "/a", "http:", "ftp://a.b", "http://[x", "data:x,y"]
)
def test_other_addresses(url: str) -> None:
    assert not is_web(url)


def test_a_long_text_is_clipped_and_says_by_how_much() -> None:
    assert clipped("a" * (TEXT_LIMIT + 7)) == ("a" * TEXT_LIMIT, 7)
    assert clipped("a") == ("a", 0)
