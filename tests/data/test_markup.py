from __future__ import annotations

import io
import re
import time
from html import escape, unescape

import py7zr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py7zr.io import BytesIOFactory

from stackllama.data.dump import rows
from stackllama.data.markup import plain_length, to_markdown
from tests.data.dumps import shared_dumps


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("", ""),
        ("  plain  ", "plain"),
        ("<p>One</p>\n\n<p>Two\nlines</p>\n", "One\n\nTwo\nlines"),
        ("<p><em>soft</em> and <strong>hard</strong></p>", "*soft* and **hard**"),
        ("<p>a<strong> b </strong>c</p>", "a **b** c"),
        ("<p><em><strong>both</strong></em></p>", "***both***"),
        ("<h2>Head</h2><p>text</p>", "## Head\n\ntext"),
        ("<p>a</p><hr><p>b</p>", "a\n\n---\n\nb"),
        ("<p>a<br>\nb<br/>c</p>", "a  \nb  \nc"),
        ("<blockquote>\n  <p>a</p>\n  <p>b</p>\n</blockquote>", "> a\n>\n> b"),
        ('<blockquote class="spoiler"><p>a</p></blockquote>', ">! a"),
        ("<ul>\n<li>a</li>\n<li>b</li>\n</ul>", "- a\n- b"),
        ('<ol start="9"><li>a</li><li>b</li></ol>', "9. a\n10. b"),
        ("<ul><li><p>a</p></li><li><p>b</p><p>c</p></li></ul>", "- a\n\n- b\n\n  c"),
        ("<ul><li>a<ol><li>b</li></ol></li><li>c</li></ul>", "- a\n  1. b\n- c"),
        ("<ul><li>a<li>b</ul>", "- a\n- b"),
        ('<p><a href="http://x.y/?a=1&amp;b=2">here</a></p>', "[here](http://x.y/?a=1&b=2)"),
        ('<a href="http://x.y/">http://x.y/</a>', "<http://x.y/>"),
        ('<a href="http://x.y" title="a &quot;t&quot;">here</a>', "[here](http://x.y \"a 't'\")"),
        ('<a href="http://x/a b">t</a>', "[t](<http://x/a b>)"),
        ('<a href="http://x/?q=1&copy=2">t</a>', "[t](http://x/?q=1&copy=2)"),
        ('<p><img src="http://i.x/1.png" alt="a cat"></p>', "![a cat](http://i.x/1.png)"),
        (
            "<p>x<sup>2</sup> H<sub>2</sub>O <kbd>Ctrl</kbd> <s>no</s></p>",
            "x<sup>2</sup> H<sub>2</sub>O <kbd>Ctrl</kbd> ~~no~~",
        ),
        ("<p>if <code>a &lt; b</code> then</p>", "if `a < b` then"),
        ("<code>a`b</code> <code>`x`</code>", "``a`b`` `` `x` ``"),
        ("<pre><code>a &lt; b\n\n  c\n</code></pre>", "```\na < b\n\n  c\n```"),
        ('<pre class="lang-py prettyprint-override"><code>x\n</code></pre>', "```py\nx\n```"),
        ('<pre class="lang-none"><code>x\n</code></pre>', "```\nx\n```"),
        ("<pre><code>```\n````\n</code></pre>", "`````\n```\n````\n`````"),
        ("<blockquote><pre><code>a\n\n b\n</code></pre></blockquote>", "> ```\n> a\n>\n>  b\n> ```"),
        (
            "<table><thead><tr><th>A</th><th>B</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>",
            "| A | B |\n| --- | --- |\n| 1 |  |",
        ),
        ("<p>a<!-- hidden -->b</p><script>alert(1)</script>", "ab"),
        ("<p>a <blink>b</blink></p>", "a b"),
    ],
)
def test_hand_worked(html: str, markdown: str) -> None:
    assert to_markdown(html) == markdown


def test_entities_are_resolved_exactly_once() -> None:
    # As in a dump after the XML is read: `&lt;` shows <, and `&amp;lt;` shows &lt;.
    assert to_markdown("<p>&lt;b&gt; &amp;lt;b&amp;gt; &amp;amp; AT&amp;T</p>") == "<b> &lt;b&gt; &amp; AT&T"
    assert to_markdown("<code>&amp;lt;</code>") == "`&lt;`"


@pytest.mark.parametrize(
    "tex",
    [
        r"$a_b * c_d \\ \{x\} \_ $",
        "$$\n\\begin{align}\n  a &= b \\\\\n    c &= d\n\\end{align}\n$$",
        r"$|\psi\rangle = \alpha |0\rangle + \beta |1\rangle$",
        "$$x  <  y\n\n> z$$",
    ],
)
def test_formulas_stay_byte_for_byte(tex: str) -> None:
    body = escape(tex, quote=False)
    assert to_markdown(f"<p>See {body} there</p>") == f"See {tex} there"
    assert f"- {tex}".replace("\n", "\n  ").replace("\n  \n", "\n\n") == to_markdown(f"<ul><li>{body}</li></ul>")
    if "\n" not in tex:
        assert tex in to_markdown(f"<h1>{body}</h1><table><tr><td>{body}</td></tr></table>")


@pytest.mark.parametrize(
    "html",
    [
        "<em>a<p>b</em>c",
        "</p></ul></blockquote></em>x",
        "<ul>x<li>y</blockquote>z",
        "<li>alone",
        "<td>cell</td>",
        "<code>never closed</p><p>next",
        "<pre>never closed",
        "<a href=x>link<a href=y>in link</a></a>",
        "a < b > c <3 <",
        "<!-- never closed",
        "<table><tr><td><pre>a\nb</pre></td></tr></table>",
    ],
)
def test_wrong_nesting_loses_no_text(html: str) -> None:
    shown = re.findall(r"[a-z]+", re.sub(r"</?[a-z][^<>]*>", " ", html))
    found = to_markdown(html)
    assert [word for word in shown if word not in found] == []


def test_deep_nesting_is_flattened_in_linear_time() -> None:
    for tag in ("blockquote", "ul><li", "table><tr><td", "em><strong", "sup><sub", "a href=x"):
        closing = "".join(f"</{part}>" for part in reversed(tag.replace(" href=x", "").split("><")))
        assert "core" in to_markdown(f"<{tag}>" * 20_000 + "core" + closing * 20_000)
    for piece in ("<!--", "<a ", '<a "', "<pre", "<code>", "&", "`", "</p", "<ul><li>x"):
        assert to_markdown(piece * 40_000) is not None


def text_of(alphabet: str) -> st.SearchStrategy[str]:
    return st.text(st.one_of(st.sampled_from(alphabet), st.characters(exclude_categories=("Cs", "Cc"))), max_size=60)


CODE = text_of("`<>&\"'\n\t $*_\\#|-")


@settings(max_examples=300, deadline=None)
@given(CODE, st.sampled_from(["", "<p>before</p>", "<ul><li>before</li></ul>"]))
def test_code_blocks_survive_byte_for_byte(code: str, before: str) -> None:
    markdown = to_markdown(f"{before}<pre><code>{escape(code)}\n</code></pre><p>after</p>")
    match = re.search(r"^(`{3,})\n(.*)\n\1\n\nafter$", markdown, re.DOTALL | re.MULTILINE)
    assert match is not None
    assert match[2] == code


@settings(max_examples=300, deadline=None)
@given(CODE)
def test_code_blocks_in_quotes_and_lists_survive_their_prefix(code: str) -> None:
    quote = to_markdown(f"<blockquote><pre><code>{escape(code)}\n</code></pre></blockquote>").split("\n")
    assert [line.removeprefix("> ").removeprefix(">" if line == ">" else "") for line in quote][1:-1] == code.split(
        "\n"
    )
    item = to_markdown(f"<ol><li><p>x</p><pre><code>{escape(code)}\n</code></pre></li></ol>").split("\n")
    assert [line.removeprefix("   ") for line in item][3:-1] == code.split("\n")


@settings(max_examples=300, deadline=None)
@given(CODE.filter(bool))
def test_inline_code_survives_byte_for_byte(code: str) -> None:
    markdown = to_markdown(f"<p>x <code>{escape(code)}</code> y</p>")
    match = re.fullmatch(r"x (`+)(.*)\1 y", markdown, re.DOTALL)
    assert match is not None
    ticks, inside = match.groups()
    assert ticks not in re.findall(r"`+", inside)  # the fence is no run of the content, so it closes where it should
    # CommonMark takes one space off both ends unless there is nothing else.
    stripped = inside[1:-1] if inside[0] == inside[-1] == " " and inside.strip(" ") else inside
    assert stripped == code


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_characters="\r", exclude_categories=("Cs", "Cc"))))
def test_text_is_never_changed(text: str) -> None:
    assert to_markdown(f"<p>{escape(text)}</p>").strip() == text.strip()
    assert plain_length(f"<p>{escape(text)}</p>") == len(text.strip())


SOUP = [
    f"<{end}{tag}>" for tag in ("p", "ul", "li", "em", "code", "pre", "table", "tr", "td", "h1") for end in ("", "/")
]
SOUP += ["<blockquote>", "</blockquote>", "<a href='x'>", "</a>", "<br>", "<!-- -->", "w", "&lt;", "<", ">"]
ENDLESS = f"&#{'9' * 5000};"  # Python reads no number of more than 4300 digits
SOUP += [ENDLESS, ENDLESS.removesuffix(";"), f"&#x{'9' * 5000};", f"<a href='{ENDLESS}'>"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(SOUP), max_size=25))
def test_any_soup_gives_an_output_and_keeps_its_words(pieces: list[str]) -> None:
    html = "".join(pieces)
    seen = re.sub(r"<!--.*?-->", "", html, flags=re.DOTALL)
    assert to_markdown(html).count("w") == seen.count("w")
    assert plain_length(html) >= 0


def test_a_number_that_no_character_has_becomes_the_replacement_character_wherever_it_stands() -> None:
    html = f'<p>a{ENDLESS}b <code>{ENDLESS}</code> <a href="x{ENDLESS}">c</a></p><pre>{ENDLESS}</pre>{ENDLESS}'
    assert to_markdown(html) == "a\ufffdb `\ufffd` [c](x\ufffd)\n\n```\n\ufffd\n```\n\n\ufffd"
    assert plain_length(f"a{ENDLESS}b") == 3
    assert to_markdown("&#65;&#0000065;&#x41;") == "AAA"


@pytest.mark.dumps
def test_code_and_formulas_of_real_posts_survive() -> None:
    folder = shared_dumps()
    tables = [path.read_bytes() for path in sorted(folder.glob("*/Posts.xml"))]
    for path in sorted(folder.glob("*.7z")):
        factory = BytesIOFactory(1 << 28)
        with py7zr.SevenZipFile(path) as packed:
            packed.extract(targets=["Posts.xml"], factory=factory)
        tables.append(factory.products["Posts.xml"].read())
    blocks = formulas = 0
    for content in tables:
        for row in rows(io.BytesIO(content), table="Posts"):
            body = row["Body"].replace("\r\n", "\n")
            markdown = to_markdown(body)
            for code in re.findall(r"<pre[^>]*><code>([^<]*)</code></pre>", body):
                blocks += 1
                assert block_with(unescape(code).removesuffix("\n"), markdown), row["Id"]
            without_code = re.sub(
                r"<(pre|code)\b.*?</\1>|<blockquote>.*?</blockquote>|<li>.*?</li>", "", body, flags=re.DOTALL
            )
            for tex in re.findall(r"\$\$[^$<]+\$\$|\$[^$<\n]+\$", without_code):
                formulas += 1
                assert unescape(tex) in markdown, row["Id"]
    assert blocks > 500
    assert formulas > 5000


def block_with(code: str, markdown: str) -> bool:
    """Whether a fenced block holds exactly this code, once the prefix of its container is taken off."""
    for match in re.finditer(r"^(.*?)(`{3,})[^`\n]*\n", markdown, re.MULTILINE):
        # An item's sign stands before its first line only.
        prefix = re.sub(r"(-|\d+\.) ", lambda sign: " " * len(sign[0]), match[1])
        lines = markdown[match.end() :].split("\n")
        inside = []
        for line in lines:
            bare = line[len(prefix) :] if line.startswith(prefix) else ""
            if bare == match[2]:
                break
            inside.append(bare)
        if "\n".join(inside) == code:
            return True
    return False


@pytest.mark.parametrize(
    "html",
    [
        "<" * 300_000,
        "<!-- " * 60_000,
        "<a href='" * 30_000,
        "<img " + "a" * 300_000 + ">",
        "<a " + "-" * 300_000 + ">x</a>",
        "<ol " + "start " * 50_000 + "><li>x",
        "<table><tr>" + "<td>a" * 25_000 + "<tr><td>b" * 15_000 + "</table>",
    ],
    ids=lambda html: html[:12],
)
def test_long_bodies_take_time_and_room_in_proportion(html: str) -> None:
    started = time.process_time()
    assert len(to_markdown(html)) <= 2 * len(html)
    plain_length(html)
    assert time.process_time() - started < 3  # minutes, were it quadratic


def test_a_table_of_rows_of_different_lengths_stays_a_table() -> None:
    html = "<table><tr><td>a<td>b<td>c" + "<tr><td>d" * 20 + "</table>"
    assert to_markdown(html).startswith("| a | b | c |\n| --- | --- | --- |\n| d |  |  |\n")
