"""Markdown of strangers: what it looks like, and that it can do no harm."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.dumps import shared_dumps

from stackllama.data.dump.rows import rows
from stackllama.data.text.markup import to_markdown
from stackllama.report.markdown import REL, to_html

TAGS = {
    *("p", "h5", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "br", "hr", "a", "kbd", "sub"),
    *("sup", "table", "thead", "tbody", "tr", "th", "td"),
}


class Seen(HTMLParser):
    """Every tag with its attributes, and the text without tags."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(decl)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


def check_harmless(text: str) -> Seen:
    seen = Seen(to_html(text))
    for tag, attributes in seen.tags:
        assert tag in TAGS
        allowed = {"a": {"href", "rel", "title"}, "code": {"class"}, "ol": {"start"}, "td": {"style"}, "th": {"style"}}
        assert attributes.keys() <= allowed.get(tag, set()), (tag, attributes)
        if tag == "a":
            assert re.match(r"(https?:|mailto:)", attributes["href"])
            assert attributes["rel"] == REL == "noopener noreferrer nofollow"
        if "style" in attributes:
            assert re.fullmatch(r"text-align:(left|right|center)", attributes["style"])
    for sign in "\x00\x1b\x7f\x9b\u202e\u2066\u200f":
        assert sign not in seen.text
    return seen


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# Head\n\ntext **bold**", "<h5>Head</h5>\n<p>text <strong>bold</strong></p>\n"),
        ("`<b>`", "<p><code>&lt;b&gt;</code></p>\n"),
        ("~~old~~", "<p><s>old</s></p>\n"),
        ("<kbd>Ctrl</kbd> H<sub>*2*</sub>O", "<p><kbd>Ctrl</kbd> H<sub><em>2</em></sub>O</p>\n"),
        ("<sup>never closed", "<p>&lt;sup&gt;never closed</p>\n"),
        ("<sup>*a</sup>*", "<p><sup>*a</sup>*</p>\n"),
        ("[a](http://b.c)", f'<p><a href="http://b.c" rel="{REL}">a</a></p>\n'),
        ("![a *b*](http://b.c/d.png)", f'<p><a href="http://b.c/d.png" rel="{REL}">[image: a *b*]</a></p>\n'),
        ("[![a](http://b.c/d)](http://e.f)", f'<p><a href="http://e.f" rel="{REL}">[image: a]</a></p>\n'),
        ("$a_b*c*d$", '<p><code class="math">$a_b*c*d$</code></p>\n'),
        ("$x$ of 5", '<p><code class="math">$x$</code> of 5</p>\n'),
        ("$5 and $6, or 7 $", "<p>$5 and $6, or 7 $</p>\n"),
        ("$6 `x$y`", "<p>$6 <code>x$y</code></p>\n"),
        ("`$x$`", "<p><code>$x$</code></p>\n"),
        ("a\n$$\n- b\n= c\n$$\nd", '<p>a</p>\n<p><code class="math">$$\n- b\n= c\n$$</code></p>\n<p>d</p>\n'),
        ("> $$\n> - b\n> $$", '<blockquote>\n<p><code class="math">$$\n- b\n$$</code></p>\n</blockquote>\n'),
        (
            "\\begin{align}\na &< b \\\\\n_c_\n\\end{align}",
            '<p><code class="math">\\begin{align}\na &amp;&lt; b \\\\\n_c_\n\\end{align}</code></p>\n',
        ),
        ("$$\nnever closed\n\n- b", "<p>$$\nnever closed</p>\n<ul>\n<li>b</li>\n</ul>\n"),
        ("a\x1bb \u202ec &#x202e;", "<p>a␛b [U+202E]c [U+202E]</p>\n"),
    ],
)
def test_what_it_looks_like(text: str, html: str) -> None:
    assert str(to_html(text)) == html
    check_harmless(text)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<kbd onclick=alert(1)>x</kbd>",
        "<sup><script>alert(1)</script></sup>",
        "<!-- --><!doctype html><?php ?>",
        "[a](javascript:alert(1))",
        "[a](JaVaScRiPt:alert(1))",
        "[a](java\tscript:alert(1))",
        "[a](&#106;avascript:alert(1))",
        "[a](data:text/html;base64,x)",
        "![a](data:image/png;base64,x)",
        "[a](vbscript:x) [b](file:///etc/passwd) [c](//evil.test) [d](/q/1) [e](x.html)",
        "<javascript:alert(1)>",
        "[a]: javascript:alert(1)\n\n[a]",
        '[a](http://b.c/"onmouseover="alert(1))',
        '[a](http://b.c "t\\" onmouseover=alert(1) x=")',
        '![" onerror="alert(1)](http://b.c)',
        '```"><script>alert(1)</script>\ncode\n```',
        "$</code><script>alert(1)</script>$",
        "| a |\n|:-:|\n| <script> |",
        "</div></main><script>",
        "{{ 7 * 7 }} {% include 'x' %}",
    ],
)
def test_nothing_of_a_stranger_becomes_markup(text: str) -> None:
    check_harmless(text)


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [
                *"[]()<>!`$*_~#|-&;:\"'\\ \n\t\x1b\u202e",
                *(
                    "javascript:",
                    "http://a.b",
                    "<script>",
                    "</script>",
                    "<kbd>",
                    "</kbd>",
                    "onerror=",
                    "$$",
                    "> ",
                    "- ",
                ),
                *("&#x202e;", "&lt;", "\\begin{a}", "\\end{a}", "![", "](", "|-|", "```", "mailto:", "data:", "text"),
            ]
        ),
        max_size=60,
    ).map("".join)
)
def test_no_mixture_of_signs_becomes_markup(text: str) -> None:
    check_harmless(text)


@pytest.mark.parametrize(
    "text",
    [
        sign * (20_000 // len(sign))
        for sign in (
            "[",
            "![",
            "*a ",
            "> ",
            "`",
            "$a ",
            "$$\n",
            "<kbd>",
            "\\begin{a}\n",
            "_*",
            "a|",
            "- ",
            "[a]: b\n",
            "<",
        )
    ],
)
def test_time_is_bounded(text: str) -> None:
    start = time.perf_counter()
    to_html(text)
    assert time.perf_counter() - start < 10  # a second, on a slow machine


@pytest.mark.dumps
@pytest.mark.parametrize("name", ["stackoverflow-2008-first-rows", "quantumcomputing-2018-09"])
def test_texts_of_real_sites(name: str) -> None:
    formulas = links = 0
    with (shared_dumps() / name / "Posts.xml").open("rb") as file:
        for number, row in enumerate(rows(file, table="Posts")):
            if number % 5 == 0:
                seen = check_harmless(to_markdown(row["Body"]))
                formulas += sum(attributes.get("class") == "math" for _, attributes in seen.tags)
                links += sum(tag == "a" for tag, _ in seen.tags)
    assert links > 50
    assert (formulas > 500) == (name == "quantumcomputing-2018-09")
