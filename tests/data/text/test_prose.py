"""What of a text is code, prose or links."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.text.prose import is_only_links, prose

URL = "https://site.org/a_(b)?c=d#e"


@pytest.mark.parametrize(
    "text",
    [
        URL,
        f"<{URL}>",
        f"[a long text of a link, with many words]({URL})",
        f'[titled]({URL} "a title, with words")',
        f"![a picture of something]({URL})",
        f"[![a picture in a link]({URL})]({URL})",
        f"[one]({URL})\n\n[two]({URL})\n\n- [and three]({URL})",
        f"See here: {URL}",  # 7 letters
        f"Try this. [x]({URL})\n\n![]({URL})",
        f"> [quoted]({URL})",
    ],
)
def test_a_text_of_links(text: str) -> None:
    assert is_only_links(text, 10)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "Yes.",
        "No link, just few",
        f"See here for it: {URL}",  # 12 letters
        f"You can try it: [this one]({URL})",  # 11 letters
        f"```\n[x]({URL})\n```",
        "`a[i](x)` and so",
        f"[link]({URL}) `code()`",
        f"[`code()`]({URL})",
        f"$E = mc^2$, [proof]({URL})",
        f"[link]({URL})\n\n$$x + y$$",
        "[no link], (neither) https and ftp",
        f"[text]({URL} да, это уже ответ)",
    ],
)
def test_a_text_with_something_of_its_own(text: str) -> None:
    assert not is_only_links(text, 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain words", "plain words"),
        ("use `x = 1` here", "use here"),
        ("a\n\n```python\ncode `` here\n```\n\nb", "a b"),
        ("`one` and `two`", "and"),
        ("a `` b ` c `` d", "a d"),  # two runs of two; the single one inside is code
        ("a ` b", "a ` b"),  # a run without an end is text
        ("see [the words](https://x.org/y_(z)) there", "see the words there"),
        ("![alt text](https://x.org/y.png) after", "after"),
        ("at https://x.org/y and <http://z.org>.", "at and ."),
        (r"so $a_b^2$ is $$\int x$$ or \alpha \begin{matrix} 1", "so is or 1"),
        ("H<sub>2</sub>O and <kbd>Ctrl</kbd>", "H 2 O and Ctrl"),
        ("it costs $5 and\n$6", "it costs $5 and $6"),
    ],
)
def test_prose_is_what_is_neither_code_nor_formula_nor_address(text: str, expected: str) -> None:
    assert " ".join(prose(text).split()) == expected


@given(st.text("ab `[]()!<>$\\/:.htps\n", max_size=60))
def test_no_text_is_too_odd(text: str) -> None:
    prose(text)
    assert not (is_only_links(text, 3) and not is_only_links(text, 30))  # more letters may be there, not fewer
