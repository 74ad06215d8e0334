r"""A reader of Markdown, and what a person sees of HTML: to ask whether a post survives a conversion.

The reader is markdown-it-py: CommonMark with tables, strikethrough and raw HTML, and two rules for formulas, written
without the code under test:

- `$$...$$`, `\(...\)`, `\[...\]` and `\begin{x}...\end{x}` are formulas, and so is `$...$` unless a digit follows, or
  it has white space at an end and no sign of TeX inside (`^`, `_`, `{`, a backslash with a letter). A blank line ends
  all of them, and none begins behind a backslash or another `$`.
- A line that begins inside a formula begins no block.

`shown` looks at the HTML of a post and at the HTML of rendered Markdown with the same eyes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from lxml import etree
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

SIGN_OF_FORMULA = re.compile(r"\\(?:begin|end)\{[^{}\s]+\}|\\.|\$+|\n[ \t]*\n", re.DOTALL)
CLOSES = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
TEX = re.compile(r"[\^_{]|\\[a-zA-Z]")
# What hides a formula's opening sign in Markdown, or is none: code, an address, an escaped sign, a sign alone.
NO_FORMULA = re.compile(
    r"""
      (`+)(?!`) .*? (?<!`)\1(?!`) | `+
    | \]\( (?: <[^<>\n]*> | (?: [^\s()] | \([^\s()]*\) )* )
    | <[a-z][^\s<>]*>
    | \$+ | \\.? | [\]<]
    """,
    re.DOTALL | re.VERBOSE,
)
UNDERLINE = re.compile(r"[ \t]*(?:=+|-+)[ \t]*")


def formula_at(text: str, position: int) -> str:
    """The formula that begins at this position; empty if none does."""
    signs = SIGN_OF_FORMULA.finditer(text, position)
    first = next(signs, None)
    before = text[position - 1] if position else ""
    if first is None or first.start() != position or before == "\\" or before == first[0][0] == "$":
        return ""
    opening = first[0]
    closing = opening.replace("begin", "end") if opening.startswith("\\begin") else CLOSES.get(opening)
    for sign in signs:
        if sign[0] == closing:
            inside = text[first.end() : sign.start()]
            if opening == "$" and (
                text[sign.end() : sign.end() + 1].isdecimal() or (inside != inside.strip() and not TEX.search(inside))
            ):
                return ""
            return text[position : sign.end()]
        if sign[0][0] == "\n" or (sign[0] == opening and opening in ("\\(", "\\[")):
            return ""
    return ""


def formulas(text: str, *, markdown: bool = False) -> Iterator[tuple[int, int]]:
    """Where the formulas of a text begin and end; in Markdown none begins in a code span."""
    opening = re.compile(r"[$\\`\]<]" if markdown else r"[$\\]")
    position = 0
    while found := opening.search(text, position):
        start = found.start()
        if formula := formula_at(text, start):
            position = start + len(formula)
            yield start, position
        else:
            skipped = NO_FORMULA.match(text, start)
            assert skipped is not None
            position = skipped.end()


def _formula(state: StateInline, silent: bool) -> bool:
    if state.src[state.pos] not in "$\\":
        return False
    formula = formula_at(state.src[: state.posMax], state.pos)
    if not formula:
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.content = formula
    state.pos += len(formula)
    return True


BlockRule = Callable[[StateBlock, int, int, bool], bool]


def _lines_in_formulas(state: StateBlock, start: int) -> set[int]:
    """The lines that begin inside a formula, in the paragraph that begins at this line."""
    end = start
    while end < state.lineMax and not state.isEmpty(end) and state.sCount[end] >= state.blkIndent:
        end += 1
    text = state.getLines(start, end, state.blkIndent, False)
    inside: set[int] = set()
    for first, last in formulas(text, markdown=True):
        above = start + text.count("\n", 0, first)
        inside.update(range(above + 1, above + 1 + text.count("\n", first, last)))
    return inside


def _patient(name: str, rule: BlockRule) -> BlockRule:
    """The rule, which begins nothing inside a formula."""

    def begins(state: StateBlock, start: int, end: int, silent: bool) -> bool:
        inside: set[int] = state.env.setdefault("inside", set())
        if silent and start in inside:
            return False
        if name == "table" and not silent and state.src[state.bMarks[start] + state.tShift[start] :][:1] != "|":
            return start + 1 not in _lines_in_formulas(state, start) and rule(state, start, end, silent)
        if name in ("paragraph", "lheading"):
            lines = _lines_in_formulas(state, start)
            inside |= lines
            if name == "lheading" and any(
                UNDERLINE.fullmatch(state.src[state.bMarks[line] : state.eMarks[line]]) for line in lines
            ):
                return False
        return rule(state, start, end, silent)

    return begins


def reader(*, math: bool = True) -> MarkdownIt:
    """CommonMark with tables and strikethrough; addresses stay as they are written."""
    markdown = MarkdownIt("commonmark", {"maxNesting": 1000}).enable(["table", "strikethrough"])
    markdown.normalizeLink = lambda url: url  # type: ignore[method-assign]
    markdown.normalizeLinkText = lambda link: link  # type: ignore[method-assign]
    markdown.validateLink = lambda url: True  # type: ignore[method-assign]
    if math:
        markdown.inline.ruler.before("escape", "formula", _formula)
        markdown.add_render_rule("formula", _as_var)
        markdown.add_render_rule("image", _image)
        for rule in markdown.block.ruler.__rules__:
            markdown.block.ruler.at(rule.name, _patient(rule.name, rule.fn), {"alt": rule.alt})
    return markdown


def _as_var(_: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return f"<var>{escape(tokens[index].content)}</var>"


def _image(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    for child in tokens[index].children or ():
        child.type = "text" if child.type == "formula" else child.type
    return self.image(tokens, index, options, env)


@dataclass
class Shown:
    """What a person sees, white space outside code and formulas taken as one space.

    `text` has a sign for each list, item, quote, heading, table, row, cell, rule and block of code, in their order.
    """

    text: str = ""
    blocks: list[str] = field(default_factory=list)
    spans: list[str] = field(default_factory=list)
    formulas: list[str] = field(default_factory=list)
    links: list[tuple[str, str, str]] = field(default_factory=list)  # (target, title, text)
    images: list[tuple[str, str, str]] = field(default_factory=list)  # (target, title, alt)
    raised: list[tuple[str, str]] = field(default_factory=list)  # (sup, sub or kbd, text)
    emphasis: dict[str, str] = field(default_factory=dict)  # all characters under em, strong, s


EMPHASIS = {"em": "em", "i": "em", "strong": "strong", "b": "strong", "s": "s", "strike": "s", "del": "s"}
STRUCTURE = frozenset({"ul", "ol", "li", "blockquote", "table", "tr", "h1", "h2", "h3", "h4", "h5", "h6"})
CELLS = frozenset({"td", "th"})
ONE_LINE = CELLS | {"h1", "h2", "h3", "h4", "h5", "h6"}
NOT_IN_CELLS = STRUCTURE - {"tr"} | {"pre", "hr"}
BLOCKS = frozenset({"p", "div", "dl", "dt", "dd", "thead", "tbody", "tfoot", "section", "article", "figure"})
MEANINGLESS = frozenset({"u", "span", "x"})
OPEN, CLOSE = "\ue000", "\ue001"
_EMPTY = re.compile(rf"{OPEN}(\w+){CLOSE}\s*!?\s*{OPEN}/\1{CLOSE}")
_AROUND = re.compile(rf"\s*({OPEN}/?\w+{CLOSE})\s*")


def shown(html: str, *, rendered: bool = False) -> Shown:
    """What HTML shows; the reader marks the formulas of what it has `rendered`, elsewhere they are looked for."""
    seen = Shown()
    if html.strip():
        tree = etree.fromstring(f"<html><body>{html}</body></html>", etree.HTMLParser(huge_tree=True))
        _Eyes(seen, rendered).look(tree)
    return seen


class _Eyes:
    """Goes through the elements once; `under` are the emphases that are open."""

    def __init__(self, seen: Shown, rendered: bool) -> None:
        self.seen = seen
        self.rendered = rendered
        self.piece = ""  # of text, without a tag in it that means something
        self.on_one_line = False
        self.stream: list[str] = []

    def look(self, tree: etree._Element) -> None:
        self.element(tree, frozenset())
        text = "".join(self.stream)
        while text != (text := _EMPTY.sub(" ", text)):
            pass
        self.seen.text = _AROUND.sub(r"\1", " ".join(text.split())).strip()

    def words(self, text: str | None, under: frozenset[str]) -> None:
        if text:
            self.stream.append(text)
            self.emphasise(text, under)
            self.piece += text

    def end_of_piece(self, *, formula: bool = False) -> None:
        """A formula in a heading or a cell is on one line."""
        if formula:
            self.seen.formulas.append(self.piece)
        elif not self.rendered and ("$" in self.piece or "\\" in self.piece):
            found = [self.piece[start:end] for start, end in formulas(self.piece)]
            self.seen.formulas += [formula.replace("\n", " ") if self.on_one_line else formula for formula in found]
        self.piece = ""

    def emphasise(self, text: str, under: frozenset[str]) -> None:
        for kind in under if text.strip() else ():
            self.seen.emphasis[kind] = self.seen.emphasis.get(kind, "") + "".join(text.split())

    def element(self, element: etree._Element, under: frozenset[str]) -> None:
        tag = element.tag
        if not isinstance(tag, str) or tag in ("script", "style"):
            return
        if tag not in MEANINGLESS:
            self.end_of_piece()
        if tag == "code":
            self.code(element, under)
            return
        if tag == "pre":
            self.pre(element)
        elif tag == "img":
            self.stream.append(f"{OPEN}img{CLOSE}")
            title, alt = _squeezed(element.get("title")), _squeezed(element.get("alt"))
            self.seen.images.append((_target(element, "src"), title, alt))
        elif tag == "hr":
            self.stream.append(f" {OPEN}hr{CLOSE} ")
        elif tag == "br":
            self.stream.append(" ")
        else:
            self.inside(tag, element, under | {EMPHASIS[tag]} if tag in EMPHASIS else under)

    def inside(self, tag: str, element: etree._Element, under: frozenset[str]) -> None:
        name = _structure(tag, element)
        around = " " if name or tag in BLOCKS or tag in CELLS or tag in STRUCTURE else ""
        parent, before, after = element.getparent(), element.getprevious(), element.getnext()
        lone = tag == "li" and parent is not None and parent.tag not in ("ul", "ol")  # shown as a list all the same
        if lone and (before is None or before.tag != "li"):
            self.stream.append(f"{OPEN}ul{CLOSE}")
        self.stream.append(f" {OPEN}{name}{CLOSE}" if name else around)
        if tag == "blockquote" and "spoiler" in (element.get("class") or ""):
            self.stream.append("! ")  # a spoiler is a quote that begins with this sign
        around_line, self.on_one_line = self.on_one_line, self.on_one_line or tag in ONE_LINE
        self.words(element.text, under)
        for child in element:
            self.element(child, under)
            self.words(child.tail, under)
        if tag not in MEANINGLESS:
            self.end_of_piece(formula=self.rendered and tag == "var")
        self.on_one_line = around_line
        self.stream.append(f"{OPEN}/{name}{CLOSE} " if name else around)
        if lone and (after is None or after.tag != "li"):
            self.stream.append(f"{OPEN}/ul{CLOSE}")
        text = _squeezed(_raw(element)) if tag in ("a", "sup", "sub", "kbd") else ""
        empty = not text and element.find(".//img") is None
        if tag == "a" and _target(element, "href") and not empty and element.find(".//a") is None:
            self.seen.links.append((_target(element, "href"), _squeezed(element.get("title")), text))
        elif tag in ("sup", "sub", "kbd") and text:
            self.seen.raised.append((tag, text))

    def code(self, element: etree._Element, under: frozenset[str]) -> None:
        """Markdown has a space where HTML shows one for a line break."""
        code = _raw(element).replace("\n", " ")
        self.seen.spans += [code] if code else []
        self.stream.append(code)
        self.emphasise(code, under)

    def pre(self, element: etree._Element) -> None:
        self.stream.append(f" {OPEN}pre{CLOSE} ")
        code = _raw(element)
        if (element.text or "").startswith("\n"):
            code = code.removeprefix("\n")  # HTML leaves out a line break right after the tag
        self.seen.blocks.append(code.removesuffix("\n"))


def _structure(tag: str, element: etree._Element) -> str:
    """The sign of an element in the text. A table with blocks in its cells has none: Markdown has no such tables."""
    if tag == "ol":
        start = element.get("start", "1")
        return "" if element.find("li") is None else "ol" if start == "1" else f"ol{start}"
    if tag in ("table", "tr", "td", "th"):
        table = element if tag == "table" else next(element.iterancestors("table"), None)
        cells = [] if table is None else list(table.iter("td", "th"))
        if any(cell.find(f".//{name}") is not None for cell in cells for name in NOT_IN_CELLS):
            return ""
        return "cell" if tag in CELLS else tag
    if tag == "ul" and element.find("li") is None:
        return ""
    return tag if tag in STRUCTURE else ""


def _raw(element: etree._Element) -> str:
    pieces = [element.text or ""]
    for child in element:
        pieces += ["\n" if child.tag == "br" else _raw(child) if isinstance(child.tag, str) else "", child.tail or ""]
    return "".join(pieces)


def _squeezed(text: str | None) -> str:
    return " ".join((text or "").split())


def _target(element: etree._Element, name: str) -> str:
    """As a browser takes it: no white space around, no line breaks and tabs inside."""
    return re.sub(r"[\t\n\r]", "", (element.get(name) or "").strip())
