from __future__ import annotations

import pytest

from stackllama.terminal import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[31mred\x07\r\x00\x7f", "\\x1b[31mred\\x07\\r\\x00\\x7f"),
        ("\x9b31m \u202eturned\u2069 \u200b", "\\x9b31m \\u202eturned\\u2069 \\u200b"),
        ("é 日本\u3000語\u00a0☺", "é 日本\u3000語\u00a0☺"),
        ("\u2028", "\\u2028"),
    ],
)
def test_only_signs_that_show_are_left(text: str, shown: str) -> None:
    assert visible(text) == shown
