r"""HTML of a post to Markdown, with code and LaTeX byte for byte.

A small renderer of our own: one pass over the tags, no tree. Libraries were checked on 14,043 bodies of real dumps;
they collapse white space inside formulas and drop `<sup>`, `<kbd>` and spoilers, and the fastest (Rust) is no faster.

What it promises:

- Text is never escaped and its white space never collapsed: `$a_b$`, `\\`, `2 * 3` and line breaks stay as they are.
  Entities are resolved once, so `&amp;lt;b&amp;gt;` comes out as `&lt;b&gt;`. CRLF becomes LF, as in any HTML parser.
- The content of `<pre>` and `<code>` stays byte for byte, apart from the line prefix of an enclosing quote or list. The
  fence is longer than any run of backticks inside.
- What Markdown has no sign for but authors write as HTML (`<sup>`, `<sub>`, `<kbd>`) stays HTML. Comments, scripts and
  unknown tags are left out; the text inside unknown tags stays.
- Every input gives an output, in time linear in its length: wrong nesting is repaired, nesting deeper than `MAX_DEPTH`
  is flattened.

Known limits: a heading is one line, so a line break inside it becomes a space; a table with a cell of several lines
becomes paragraphs, a cell each; formatting that a block interrupts ends at the block.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from html import unescape

MAX_DEPTH = 40
"""Quotes, lists and tables inside each other; prefixing lines costs time for each level."""

# `[^<>]*` and not a quoted-string grammar: attribute values in dumps have < and > escaped, and this cannot backtrack.
_TAG = re.compile(r"<(?:(/?)([a-zA-Z][a-zA-Z0-9]*)([^<>]*)>|!--)")
_ANY_TAG = re.compile(r"<[^<>]+>")
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_AFTER_BREAK = re.compile(r"[ \t]*\n?[ \t]*")
_END_OF_PRE = re.compile(r"</pre\s*>", re.IGNORECASE)
# An unclosed <code> ends with its block, lest it swallow the rest of the post.
_END_OF_CODE = re.compile(r"</code\s*>|(?=</(?:p|li|blockquote|pre|h[1-6]|td|ul|ol)\b)", re.IGNORECASE)
_END_OF_SCRIPT = re.compile(r"</(?:script|style)\s*>", re.IGNORECASE)
# A name is taken whole or not at all: trying its parts would take quadratic time where no `=` follows.
_ATTRIBUTE = re.compile(r"""(?<![a-zA-Z-])([a-zA-Z-]++)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""")
# In attribute values `&copy=1` is no entity (HTML standard), so the semicolon is asked for.
_ENTITY = re.compile(r"&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")
# Python refuses to read numbers of thousands of digits; no character has a number of more than seven.
_LONG_REFERENCE = re.compile(r"&#[0-9]{11,};?")
_LANGUAGE = re.compile(r"\blang(?:uage)?-([A-Za-z0-9+#.-]+)")
_TICKS = re.compile(r"`+")

_SPACE = " \t\r\n"
_MARKS = {"em": "*", "i": "*", "strong": "**", "b": "**", "s": "~~", "strike": "~~", "del": "~~"}
_AS_HTML = frozenset({"sup", "sub", "kbd"})
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_PLAIN_BLOCKS = frozenset({"p", "div", "thead", "tbody", "tfoot", "section", "article", "dl", "dt", "dd", "figure"})
_CONTAINERS = frozenset({"blockquote", "ul", "ol", "li", "table", "tr", "td", "th"})
_LISTS = frozenset({"ul", "ol"})
_CELLS = frozenset({"td", "th"})
# A closing tag reaches through open containers, but not out of the one that owns it.
_BARRIERS = {"li": _LISTS, "td": frozenset({"table"}), "th": frozenset({"table"}), "tr": frozenset({"table"})}


def to_markdown(html: str) -> str:
    """The body of a post as Markdown, without white space at its ends. Never fails."""
    return _Renderer(html).run()


def plain_length(html: str) -> int:
    """How many characters a reader sees: tags off, entities resolved, white space at both ends off.

    This is the length behind the baseline "the longer answer wins": addresses of links and signs of Markdown do not
    count.
    """
    end = html.rfind(">") + 1  # behind it no tag ends; looking for an end at each `<` would take quadratic time
    return len(_resolved(re.sub(r"<[^>]+>", "", html[:end]) + html[end:]).strip())


@dataclass(slots=True)
class _Container:
    """An open quote, list, item, table, row or cell; the post itself has the tag "post"."""

    tag: str
    attributes: str = ""
    blocks: list[tuple[str, str]] = field(default_factory=list)  # (kind: "text", "list" or "block"; Markdown)
    loose: bool = False  # an item with paragraphs: blank lines between the items
    rows: list[list[str]] = field(default_factory=list)  # of a table
    cells: list[str] = field(default_factory=list)  # of a row


class _Renderer:
    """One body on its way to Markdown: the open containers, and the pieces of the line in the making."""

    def __init__(self, html: str) -> None:
        self.html = html.replace("\r\n", "\n").replace("\r", "\n") if "\r" in html else html
        self.open = [_Container("post")]
        self.inline: list[str] = []
        self.marks: list[tuple[str, int, str]] = []  # (tag, index of its first piece, attributes)
        self.heading = ""
        self.flattened: Counter[str] = Counter()
        self.comments_end = True

    def run(self) -> str:
        html, position, search, inline = self.html, 0, _TAG.search, self.inline
        while match := search(html, position):
            start = match.start()
            if start > position:
                text = html[position:start]
                inline.append(_resolved(text))
            position = match.end()
            closing, name, attributes = match.groups()
            if name is None:
                position = self._skip_comment(position)
            elif closing:
                self._close(name.lower())
            else:
                position = self._open(name.lower(), attributes, position)
        inline.append(_resolved(html[position:]))
        self._flush()
        while len(self.open) > 1:
            self._pop()
        return _joined(self.open[0].blocks, tight=False)

    def _skip_comment(self, position: int) -> int:
        end = self.html.find("-->", position) if self.comments_end else -1
        if end >= 0:
            return end + 3
        self.comments_end = False  # searched once; without this, many openings would cost quadratic time
        self.inline.append("<!--")
        return position

    def _open(self, tag: str, attributes: str, position: int) -> int:
        """Takes an opening tag; returns where to read on (raw elements are taken whole)."""
        if tag in _MARKS or tag in _AS_HTML or tag == "a":
            if not any(_same(tag, mark[0]) for mark in self.marks):
                self.marks.append((tag, len(self.inline), attributes))
        elif tag == "code":
            return self._code_span(position)
        elif tag == "br":
            # A cell is one line of the Markdown; GFM allows the tag itself there.
            self.inline.append("<br>" if self.open[-1].tag in _CELLS else "  \n")
            return _end(_AFTER_BREAK.match(self.html, position), position)
        elif tag == "img":
            given = _attributes(attributes)
            self.inline.append(f"![{given.get('alt', '')}]({_address(given)})")
        elif tag == "pre":
            return self._code_block(attributes, position)
        elif tag in ("script", "style"):
            return _end(_END_OF_SCRIPT.search(self.html, position), len(self.html))
        else:
            self._open_block(tag, attributes)
        return position

    def _open_block(self, tag: str, attributes: str) -> None:
        if tag in _HEADINGS:
            self._flush()
            self.heading = _HEADINGS[tag]
        elif tag == "hr":
            self._flush()
            self.open[-1].blocks.append(("block", "---"))
        elif tag in _PLAIN_BLOCKS:
            self._flush()
            if tag == "p" and self.open[-1].tag == "li":
                self.open[-1].loose = True
        elif tag in _CONTAINERS:
            self._flush()
            if tag in _BARRIERS:  # <li>a<li>b: the second item ends the first
                self._close_container(tag)
            if len(self.open) > MAX_DEPTH:
                self.flattened[tag] += 1
            else:
                self.open.append(_Container(tag, attributes))

    def _close(self, tag: str) -> None:
        if tag in _MARKS or tag in _AS_HTML or tag == "a":
            if any(mark[0] == tag for mark in self.marks):
                while self._finish_mark() != tag:
                    pass
        elif tag in _HEADINGS or tag in _PLAIN_BLOCKS:
            self._flush()
        elif tag in _CONTAINERS:
            self._flush()
            if self.flattened[tag]:
                self.flattened[tag] -= 1
            else:
                self._close_container(tag)

    def _close_container(self, tag: str) -> None:
        """Ends the nearest open container of this tag and what is open inside it; none is open: nothing happens."""
        barrier = _BARRIERS.get(tag, frozenset())
        for depth in range(len(self.open) - 1, 0, -1):
            if self.open[depth].tag == tag:
                while len(self.open) > depth:
                    self._pop()
                return
            if self.open[depth].tag in barrier:
                return

    def _finish_mark(self) -> str:
        """Ends the innermost open mark; white space at its ends moves outside, where Markdown wants it."""
        tag, start, attributes = self.marks.pop()
        content = "".join(self.inline[start:])
        del self.inline[start:]
        core = content.strip(_SPACE)
        if not core:
            self.inline.append(content)
            return tag
        head = len(content) - len(content.lstrip(_SPACE))
        self.inline.append(content[:head] + _marked(tag, core, attributes) + content[head + len(core) :])
        return tag

    def _flush(self) -> None:
        """Ends the line in the making: what it holds becomes a block of the innermost container."""
        while self.marks:
            self._finish_mark()
        text = "".join(self.inline)
        self.inline.clear()
        heading, self.heading = self.heading, ""
        if text and not text.isspace():
            text = text.strip(_SPACE)
            if heading:
                self.open[-1].blocks.append(("block", heading + " ".join(text.split("\n"))))
            else:
                self.open[-1].blocks.append(("text", text))

    def _code_span(self, position: int) -> int:
        match = _END_OF_CODE.search(self.html, position)
        content = self.html[position : match.start() if match else len(self.html)]
        code = _raw_text(content)
        if code:
            ticks = "`" * (_longest_run(code) + 1)
            # CommonMark takes one space off each end when both are there, so one more keeps the content.
            pad = " " if code[0] == "`" or code[-1] == "`" or (code[0] == code[-1] == " " and code.strip(" ")) else ""
            self.inline.append(f"{ticks}{pad}{code}{pad}{ticks}")
        return match.end() if match else len(self.html)

    def _code_block(self, attributes: str, position: int) -> int:
        self._flush()
        match = _END_OF_PRE.search(self.html, position)
        content = self.html[position : match.start() if match else len(self.html)]
        language = _LANGUAGE.search(attributes) or _LANGUAGE.search(content[: content.find(">") + 1])
        name = "" if language is None or language[1] == "none" else language[1]
        code = _raw_text(content.removeprefix("\n"))
        ticks = "`" * max(3, _longest_run(code) + 1)
        self.open[-1].blocks.append(("block", f"{ticks}{name}\n{code.removesuffix(chr(10))}\n{ticks}"))
        return match.end() if match else len(self.html)

    def _pop(self) -> None:
        """Ends the innermost container and hands its Markdown to the one around it."""
        container = self.open.pop()
        parent, tag, blocks = self.open[-1], container.tag, container.blocks
        if tag == "blockquote" and blocks:
            sign = ">! " if "spoiler" in container.attributes else "> "
            parent.blocks.append(("block", _prefixed(_joined(blocks, tight=False), sign, sign)))
        elif tag == "li" and blocks:
            parent.loose = parent.loose or container.loose
            item = _joined(blocks, tight=not container.loose)
            # An item outside any list is a bullet by itself.
            parent.blocks.append(("item", item) if parent.tag in _LISTS else ("block", _prefixed(item, "- ", "  ")))
        elif tag in _LISTS and blocks:
            parent.blocks.append(("list", _list(container)))
        elif tag in _CELLS:
            if parent.tag == "tr":
                parent.cells.append(_joined(blocks, tight=False))
            else:
                parent.blocks.extend(blocks)
        elif tag == "tr":
            if parent.tag == "table":
                parent.rows.append(container.cells)
            else:
                parent.blocks.extend(("text", cell) for cell in container.cells if cell)
            parent.blocks.extend(blocks)
        elif tag == "table":
            parent.blocks.extend(blocks + _table(container.rows))


def _resolved(text: str) -> str:
    """The text with its entities resolved once; a number that is no character's becomes U+FFFD, however long it is."""
    return unescape(_LONG_REFERENCE.sub("\ufffd", text)) if "&" in text else text


def _end(match: re.Match[str] | None, otherwise: int) -> int:
    return match.end() if match else otherwise


def _same(tag: str, other: str) -> bool:
    return tag == other or (tag in _MARKS and _MARKS[tag] == _MARKS.get(other))


def _attributes(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTE.findall(text):
        value = double or single or bare
        found.setdefault(name.lower(), _ENTITY.sub(lambda match: _resolved(match[0]), value) if "&" in value else value)
    return found


def _address(given: dict[str, str]) -> str:
    """The target of a link or an image, with its title if there is one."""
    target = given.get("href", given.get("src", "")).strip(_SPACE)
    if any(sign in target for sign in " \t\n") or target.count("(") != target.count(")"):
        target = f"<{target}>"
    title = given.get("title", "").replace('"', "'").replace("\n", " ")
    return f'{target} "{title}"' if title else target


def _marked(tag: str, text: str, attributes: str) -> str:
    if tag in _AS_HTML:
        return f"<{tag}>{text}</{tag}>"
    if tag in _MARKS:
        return f"{_MARKS[tag]}{text}{_MARKS[tag]}"
    given = _attributes(attributes)
    href = given.get("href", "").strip(_SPACE)
    if not href:
        return text
    return f"<{href}>" if href == text and ":" in href and "title" not in given else f"[{text}]({_address(given)})"


def _raw_text(html: str) -> str:
    """The characters of a code element: tags off, line breaks kept, entities resolved once."""
    if "<" in html:
        html = _ANY_TAG.sub("", _BREAK.sub("\n", html))
    return _resolved(html)


def _longest_run(code: str) -> int:
    return max((len(run) for run in _TICKS.findall(code)), default=0) if "`" in code else 0


def _prefixed(text: str, first: str, following: str) -> str:
    """The text with `first` before its first line and `following` before the others; empty lines get no trailing
    space.
    """
    head, *rest = text.split("\n")
    lines = [(first + head) if head else first.rstrip(" ")]
    lines += [(following + line) if line else following.rstrip(" ") for line in rest]
    return "\n".join(lines)


def _joined(blocks: list[tuple[str, str]], *, tight: bool) -> str:
    """The blocks, a blank line between them; in a tight item a list inside follows its text at once."""
    parts: list[str] = []
    for index, (kind, text) in enumerate(blocks):
        if index:
            parts.append("\n" if tight and kind == "list" and blocks[index - 1][0] == "text" else "\n\n")
        parts.append(text)
    return "".join(parts)


def _list(container: _Container) -> str:
    start = _attributes(container.attributes).get("start", "") if container.tag == "ol" else ""
    number = int(start) if start.isascii() and start.isdigit() and len(start) < 10 else 1
    items: list[str] = []
    for kind, text in container.blocks:
        if kind != "item":  # a list or text straight inside the list
            items.append(_prefixed(text, "  ", "  ") if kind == "list" else text)
            continue
        sign = f"{number}. " if container.tag == "ol" else "- "
        number += 1
        items.append(_prefixed(text, sign, " " * len(sign)))
    return ("\n\n" if container.loose else "\n").join(items)


def _table(rows: list[list[str]]) -> list[tuple[str, str]]:
    """A pipe table with the first row as its head. A `|` in a cell is not escaped: in a formula that would change
    it.
    """
    rows = [row for row in rows if row]
    width, cells = max(map(len, rows), default=0), sum(map(len, rows))
    # Filled up with empty cells, a few long rows among many short ones would take any amount of memory.
    if any("\n" in cell for row in rows for cell in row) or width * len(rows) > 4 * cells + 1000:
        return [("text", cell) for row in rows for cell in row if cell]
    if not rows:
        return []
    lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * width)
    return [("block", "\n".join(lines))]
