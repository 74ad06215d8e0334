r"""Markdown of strangers as HTML that can do no harm.

What it promises, whatever the text:

- Only tags that are written here or by markdown-it come out; HTML in the text is shown as text. (`<kbd>`, `<sub>` and
  `<sup>`, for which Markdown has no sign, are kept where they are closed.)
- Links lead to http, https or mailto, do not say where the reader came from and give away no weight in search engines.
- Nothing is loaded: an image becomes a link to it.
- LaTeX stays as it was written, as a kind of code. Nobody typesets it: that would take a script.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping, Sequence
from html import escape
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markupsafe import Markup

from stackllama.report.layout import pictured

REL = "noopener noreferrer nofollow"
SCHEMES = ("http", "https", "mailto")
HEADING = "h5"
"""Headings of all levels: they stand below those of the page."""

_KEPT = re.compile(r"<(kbd|sub|sup)>(.{1,500}?)</\1>", re.DOTALL)
# TeX is told from money: no space inside of the signs, no digit behind them.
_FORMULA = re.compile(
    r"\$\$[^$`]+\$\$|\$(?![\s$])[^$`\n]*(?<![\s\\])\$(?!\d)|\\begin\{(\w+\*?)\}[^`]*?\\end\{\1\}", re.ASCII
)
_FORMULA_BEGINS = re.compile(r"\$\$|\\begin\{(\w+\*?)\}", re.ASCII)


def to_html(text: str) -> Markup:
    """The text as HTML; control characters and signs that turn the direction of writing are made visible."""
    return Markup(pictured(_PARSER.render(text)))  # noqa: S704 - markdown-it escapes all that it did not write itself


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.block.ruler.before("fence", "formula", _formula_block, {"alt": ["paragraph", "blockquote", "list"]})
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.inline.ruler.before("html_inline", "kept", _kept)
    parser.core.ruler.push("harmless", _harmless)
    parser.add_render_rule("formula", _as_written)
    parser.validateLink = _allowed  # type: ignore[method-assign, assignment]
    return parser


def _allowed(address: str) -> bool:
    try:
        return urlsplit(address).scheme in SCHEMES
    except ValueError:
        return False


def _formula_block(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """Lines from `$$` or a "begin" to a line that ends with `$$` or the "end" of the same name, none of them empty."""
    begins = _FORMULA_BEGINS.match(state.src, state.bMarks[first] + state.tShift[first], state.eMarks[first])
    if begins is None or state.is_code_block(first):
        return False
    closing = rf"\end{{{begins[1]}}}" if begins[1] else "$$"
    at = begins.end()
    for line in range(first, end):
        rest = state.src[at : state.eMarks[line]].rstrip()
        if rest.endswith(closing):
            break
        if closing in rest or state.isEmpty(line):
            return False
        at = state.bMarks[min(line + 1, end - 1)]
    else:
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.content = state.getLines(first, line + 1, state.blkIndent, False).strip()
        state.line = line + 1
    return True


def _formula(state: StateInline, silent: bool) -> bool:
    found = _FORMULA.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("formula", "", 0).content = found[0]
    state.pos = found.end()
    return True


def _kept(state: StateInline, silent: bool) -> bool:
    """<kbd>Ctrl</kbd> and its like; what is inside is Markdown."""
    found = _KEPT.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("kept_open", found[1], 1)
        outer, state.pos, state.posMax = state.posMax, found.start(2), found.end(2)
        state.md.inline.tokenize(state)
        state.posMax = outer
        state.push("kept_close", found[1], -1)
    state.pos = found.end()
    return True


def _harmless(state: StateCore) -> None:
    for token in state.tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = HEADING
        if token.children:
            token.children = list(_loading_nothing(token.children))


def _loading_nothing(tokens: Sequence[Token]) -> Iterator[Token]:
    """The tokens of a line, with images as links, and links with what they need."""
    inside = False
    for token in tokens:
        if token.type in ("link_open", "link_close"):
            inside = token.type == "link_open"
        if token.type == "link_open":
            token.attrSet("rel", REL)
        if token.type != "image":
            yield token
            continue
        name = Token("text", "", 0, content=f"[image: {token.content or 'no description'}]")
        if inside:  # a link holds no other
            yield name
        else:
            yield Token("link_open", "a", 1, attrs={"href": str(token.attrs["src"]), "rel": REL})
            yield name
            yield Token("link_close", "a", -1)


def _as_written(_: Any, tokens: Sequence[Token], at: int, __: Any, ___: MutableMapping[str, Any]) -> str:
    shown = f'<code class="math">{escape(tokens[at].content)}</code>'
    return f"<p>{shown}</p>\n" if tokens[at].block else shown


_PARSER = _parser()
