from __future__ import annotations

import pytest

from stackllama.data.text.markdown import address, as_text, code_span, flanks, heading, paragraphs


def text(given: str, *, in_link: bool = False, dollar_follows: bool = False, alone: bool = False) -> str:
    return as_text(given, in_link, lambda: dollar_follows, lambda _: alone)


@pytest.mark.parametrize(
    "given",
    [
        "2 * 3",
        "a_b",
        "a _ b",
        "C++",
        "x < y",
        "<3",
        "AT&T",
        "&nope;",
        "#5",
        "[1]",
        "a\\b",
        "c:\\dir",
        "5 ~ 6",
        "a | b",
        "!",
    ],
)
def test_what_no_reader_takes_for_a_sign_stays(given: str) -> None:
    assert text(given) == given


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("*a", "\\*a"),
        ("** a", "\\*\\* a"),
        ("_a_", "\\_a\\_"),
        ("a`b", "a\\`b"),
        ("[a](b)", "[a\\](b)"),
        ("<a>", "\\<a>"),
        ("&lt; &#35;", "\\&lt; \\&#35;"),
        ("a\\.b", "a\\\\.b"),
        ("a\\_b", "a\\\\\\_b"),
        ("a\\", "a\\\\"),
        ("~~a", "\\~\\~a"),
        ("\\(a", "\\\\(a"),
        ("\\begin{a}", "\\\\begin{a}"),
    ],
)
def test_what_a_reader_would_take_for_a_sign_is_escaped(given: str, written: str) -> None:
    assert text(given) == written


def test_a_sign_that_needs_another_stays_where_it_is_alone() -> None:
    assert text("*a", alone=True) == "*a"
    assert text("*a*", alone=True) == "\\*a\\*"
    assert text("\\*a", alone=True) == "\\\\*a"  # the backslash would hide it
    assert text("`$`$", alone=True) == "\\`$`$"  # a formula has the other


@pytest.mark.parametrize(
    "formula",
    [
        "$a$",
        "$a_b*c$",
        "$ a_b $",
        "$$ a $b$ $$",
        "$a$$b$",
        "\\(*a*\\)",
        "\\[ \\\\ \\]",
        "\\begin{x}*\\begin{y}\\end{y}\\end{x}",
    ],
)
def test_formulas_stay(formula: str) -> None:
    assert text(f"*{formula}*") == f"\\*{formula}\\*"
    assert text(f"{formula}, {formula}") == f"{formula}, {formula}"


@pytest.mark.parametrize(
    "given",
    [
        "$5*x and $6",
        "$ 5*x $",
        "$a\\$*x",
        "$a\n\n*x$",
        "\\\\(*x\\)",
        "\\$*x$",
        "$$$*x$$$",
        "\\(*x",
        "\\begin{x}*x\\end{y}",
    ],
)
def test_what_is_no_formula_is_escaped(given: str) -> None:
    assert "\\*x" in text(given)


def test_a_dollar_sign_is_escaped_if_another_follows() -> None:
    assert text("US$5", dollar_follows=True) == "US\\$5"
    assert text("US$5") == "US$5"
    assert text("$5 to \\$6") == "\\$5 to \\\\\\$6"  # the doubled backslash no longer hides the second


def test_brackets_in_a_link_match() -> None:
    assert text("[a] [[b]]", in_link=True) == "[a] [[b]]"
    assert text("[a]]", in_link=True) == "&#91;a\\]\\]"
    assert text("[a](b)", in_link=True) == "&#91;a\\](b)"


def test_lines_begin_no_blocks() -> None:
    # Only 1 begins a list within a paragraph; only the lines below the first underline one.
    assert paragraphs("3. a\n3. b\n1) c\n# d\n== e\n==") == ["3\\. a\n3. b\n1\\) c\n\\# d\n== e\n\\=="]
    assert paragraphs("a|b\n-|-") == ["a|b\n\\-|-"]
    assert paragraphs("a \n  b\n\n- c") == ["a\nb", "\\- c"]
    assert paragraphs("a\x1db\x1d\n\x1dc\x00- d") == ["a  \nb", "c\n- d"]


def test_addresses() -> None:
    assert address("x?a=1&b=2", "") == "x?a=1&b=2"
    assert address("x(a)", 'b "c"') == 'x(a) "b \\"c\\""'
    assert address("a b", "") == "<a b>"
    assert address("x)(", "") == "<x)(>"
    assert address("&lt;\\(", "") == "<\\&lt;\\\\(>"
    assert address("", "t") == '<> "t"'


def test_headings_and_code() -> None:
    assert heading(2, "a\n b ##") == "## a b \\##"
    assert heading(1, "C#") == "# C#"
    assert code_span("a``b") == "```a``b```"
    assert code_span(" a ") == "`  a  `"


@pytest.mark.parametrize(
    ("outside", "inside", "nested", "begins"),
    [
        ("", "(", False, True),
        (" ", "(", True, True),
        ("a", "(", False, False),
        ("a", "b", False, True),
        ("a", "b", True, False),  # it could end what is around
        (".", "b", True, True),
        ("*", "b", False, False),
    ],
)
def test_where_emphasis_begins(outside: str, inside: str, nested: bool, begins: bool) -> None:
    assert flanks(outside, inside, nested=nested) is begins
