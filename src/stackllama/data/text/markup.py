r"""HTML of a post to Markdown, with code and LaTeX byte for byte.

A renderer of our own: one pass over the tags, no tree. What it promises (docs/decisions/0002 has the figures):

- Rendering the Markdown again shows the same text, code, links, images, lists, quotes and tables. So text is escaped
  where Markdown would read a sign, and nowhere else; formulas never are (data/text/markdown.py has the rules). Entities
  are resolved once: `&amp;lt;b&amp;gt;` is the text `&lt;b&gt;`, written `\&lt;b\&gt;`. CRLF becomes LF.
- The content of `<pre>` and `<code>` stays byte for byte, apart from the line prefix of an enclosing quote or list, and
  from line breaks within a line of text, which are spaces there. A fence is longer than any run of backticks inside.
- What Markdown has no sign for but authors write as HTML (`<sup>`, `<sub>`, `<kbd>`) stays HTML, and so does emphasis
  where stars would be read as stars (`a<b>.b</b>c`). Comments, scripts and unknown tags are left out; the text inside
  unknown tags stays.
- Every input gives an output, in time linear in its length: wrong nesting is repaired, nesting deeper than `MAX_DEPTH`
  is flattened.

Known limits: a heading is one line, and so is a cell; a table with a list, quote, code or table in a cell becomes what
its cells hold; formatting that a block interrupts ends at the block; elements without content are left out. A spoiler
is a quote that begins with `>!`, its further lines with `>`: as the site writes it, and a quote to every reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import unescape
from typing import Any

from stackllama.data.text import markdown
from stackllama.data.text.markdown import HARD_BREAK, RESERVED, SIGNS
from stackllama.data.text.markdown_blocks import Block, joined, listed, prefixed, quoted, table

MAX_DEPTH = 40
"""Quotes, lists and tables inside each other; prefixing lines costs time for each level."""
MAX_MARKS = 10
"""Emphasis, links and the like inside each other."""

# `[^<>]*` and not a quoted-string grammar: attribute values in dumps have < and > escaped, and this cannot backtrack.
_TAGS = re.compile(r"(<(?:[/a-zA-Z][^<>]*>)?)")
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)([^>]*)>")
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_ANY_TAG = re.compile(r"<[^<>]+>")
# A name is taken whole or not at all: trying its parts would take quadratic time where no `=` follows.
_ATTRIBUTE = re.compile(r"""(?<![a-zA-Z-])([a-zA-Z-]++)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""")
# In attribute values `&copy=1` is no entity (HTML standard), so the semicolon is asked for.
_ENTITY = re.compile(r"&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")
# Python refuses to read numbers of thousands of digits; no character has a number of more than seven.
_LONG_REFERENCE = re.compile(r"&#[0-9]{11,};?")
_PLAIN_LINK = re.compile(r"""\s*href="([^"&\\<>()\s\x00-\x20\x7f]+)"(?:\s+rel="[^"]*")?\s*""")
_LANGUAGE = re.compile(r"\blang(?:uage)?-([A-Za-z0-9+#.-]+)")

_FIRST_SIGNS = markdown.FIRST_SIGNS
_SPACE = " \t\r\n" + HARD_BREAK
_MARKS = {"em": "*", "i": "*", "strong": "**", "b": "**", "s": "~~", "strike": "~~", "del": "~~"}
_AS_HTML = ("sup", "sub", "kbd")
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = ("div", "thead", "tbody", "tfoot", "section", "article", "dl", "dt", "dd", "figure")
_CONTAINERS = ("blockquote", "ul", "ol", "li", "table", "tr", "td", "th")
_LISTS = frozenset({"ul", "ol"})
_CELLS = frozenset({"td", "th"})
# A closing tag reaches through open containers, but not out of the one that owns it.
_BARRIERS = {"li": _LISTS, "td": frozenset({"table"}), "th": frozenset({"table"}), "tr": frozenset({"table"})}

_AGAIN = "again"
_NOTHING = "<!-- -->"
_COULD_GO_ON = re.compile(r"(?:\]|&#?\w*)\Z")
_BECOME = {"*": ("<em", "<i", "<strong", "<b"), "~": ("<s", "<del"), "`": ("<code",)}
_ENDS_BLOCK = frozenset(f"</{name}>" for name in ("p", *_BLOCKS, *_HEADINGS, *_CONTAINERS))


def to_markdown(html: str) -> str:
    """The body of a post as Markdown, without white space at its ends. Never fails."""
    return _Renderer(html).run()


def rendered(html: str) -> tuple[str, int]:
    """The body as `to_markdown` gives it, and its `plain_length`."""
    renderer = _Renderer(html)
    if renderer.html is html and "<" not in renderer.pieces:  # then both take the same for tags
        length = len(_resolved("".join(renderer.pieces[::2])).strip())
    else:
        length = plain_length(html)
    return renderer.run(), length


def plain_length(html: str) -> int:
    """How many characters a reader sees: tags off, entities resolved, white space at both ends off.

    This is the length behind the baseline "the longer answer wins": addresses of links and signs of Markdown do not
    count.
    """
    end = html.rfind(">") + 1  # behind it no tag ends, and looking for its end from each `<` would take long
    return len(_resolved(re.sub(r"<[^>]+>", "", html[:end]) + html[end:]).strip())


@dataclass(slots=True)
class _Container:
    """An open quote, list, item, table, row or cell; the post itself has the tag "post"."""

    tag: str
    attributes: str = ""
    blocks: list[Block] = field(default_factory=list)
    loose: bool = False  # an item with paragraphs: blank lines between the items
    parts: list[Any] = field(default_factory=list)  # the rows of a table, the cells of a row


class _Renderer:
    """One body on its way to Markdown: the open containers, and the pieces of the line in the making."""

    def __init__(self, html: str) -> None:
        if "\r" in html:
            html = html.replace("\r\n", "\n").replace("\r", "\n")
        for sign in RESERVED:
            if sign in html:
                html = html.replace(sign, "\ufffd")
        self.html = html
        self.pieces: list[str] = _TAGS.split(html)  # text, tag or bare `<`, text, tag, ..., text
        self.next = 0  # the index of the text to read
        self.signs = [sign for sign in SIGNS if sign in html]  # what the text may have; it has no `<`
        self.open = [_Container("post")]
        self.inline: list[str] = []
        self.marks: list[tuple[str, int, str]] = []  # (tag, index of its first piece, address)
        self.unsure: list[tuple[int, str]] = []  # (index, tag) of emphasis that ends only if the next piece lets it
        self.heading = 0
        self.flattened: dict[str, int] = {}
        self.comments_end = True

    def run(self) -> str:
        pieces, inline, signs, meaning = self.pieces, self.inline, self.signs, _MEANINGS.get
        held = ""  # text in front of a tag that is left out: what follows belongs to the same piece
        last = len(pieces) - 1
        while (index := self.next) < last:
            text, tag = pieces[index], pieces[index + 1]
            self.next = index + 2
            take, name, attributes = meaning(tag) or _meaning(tag)
            if take is None:
                held += _resolved(text) + self._left_out(tag)
                continue
            if held:
                self._text(held + _resolved(text))
                held = ""
            elif text and (inline or not text.isspace()):
                for sign in signs:
                    if sign in text:
                        self._text(_resolved(text))
                        break
                else:
                    inline.append(text)
            take(self, name, attributes)
        if self.next == last:
            held += _resolved(pieces[last])
        self.next = last + 2
        self._text(held)
        self._flush()
        while len(self.open) > 1:
            self._pop()
        return joined(self.open[0].blocks, tight=False)

    def _text(self, text: str) -> None:
        """Takes text, its entities resolved, in front of the tag before `next`."""
        if text:
            in_link = bool(self.marks) and any(mark[0] == "a" for mark in self.marks)
            self.inline.append(markdown.as_text(text, in_link, self._dollar_follows, self._is_alone))

    def _left_out(self, tag: str) -> str:
        """The text that a tag without a meaning is worth: none, but for a `<` that begins neither tag nor comment."""
        pieces = self.pieces
        if tag != "<":
            return ""
        if not pieces[self.next].startswith("!--") or not self.comments_end:
            return tag
        for index in range(self.next, len(pieces)):
            end = pieces[index].find("-->", 3 if index == self.next else 0)
            if end >= 0:
                self.next = index + index % 2  # it ends with a tag, or within text
                if index == self.next:
                    pieces[index] = pieces[index][end + 3 :]
                return ""
        self.comments_end = False  # searched once; without this, many openings would cost quadratic time
        return tag

    def _dollar_follows(self) -> bool:
        """Whether a `$` comes behind the text that was taken last, in the same block."""
        # In Markdown, the address of a link stands behind its text.
        return any("$" in mark[2] for mark in self.marks) or self._follows("$")

    def _is_alone(self, sign: str) -> bool:
        """Whether this sign comes nowhere in the block of the text that was taken last, but in that text."""
        return not (self.marks or any(sign in piece for piece in reversed(self.inline)) or self._follows(sign))

    def _follows(self, sign: str) -> bool:
        tags = _BECOME.get(sign, ())
        for index in range(self.next - 1, len(self.pieces)):
            piece = self.pieces[index]
            if piece in _ENDS_BLOCK:
                return False
            if sign in _resolved(piece) or piece.startswith(tags):
                return True
        return False

    def _open_paragraph(self, _name: str, _attributes: str) -> None:
        if self.inline or self.marks:
            self._flush()
        container = self.open[-1]
        if container.tag == "li":
            container.loose = True
        if self.heading:
            return
        pieces, blocks = self.pieces, container.blocks
        while text := self._paragraph("</p>"):  # one paragraph after the other, as long as they are plain
            blocks.append(("text", text))
            behind = self.next = self.next + 2
            if behind + 1 == len(pieces) or pieces[behind + 1] != "<p>" or pieces[behind].strip():
                return
            self.next += 2

    def _open_block(self, name: str, _attributes: str) -> None:
        if self.inline or self.marks:
            self._flush()
        self.heading = _HEADINGS.get(name, 0)

    def _close_block(self, name: str, _attributes: str) -> None:
        if self.inline or self.marks:
            self._flush()
        if name != "p":
            self.heading = 0

    def _open_container(self, tag: str, attributes: str) -> None:
        if self.inline or self.marks:
            self._flush()
        self.heading = 0
        parent = self.open[-1]
        if tag == "li" and parent.tag in _LISTS and (text := self._paragraph("</li>")):
            parent.blocks.append(("item", text))
            self.next += 2
            return
        if tag in _BARRIERS and parent.tag not in _BARRIERS[tag]:  # <li>a<li>b: the second item ends the first
            self._end_container(tag)
        if len(self.open) > MAX_DEPTH:
            self.flattened[tag] = self.flattened.get(tag, 0) + 1
        else:
            self.open.append(_Container(tag, attributes))

    def _close_container(self, tag: str, _attributes: str) -> None:
        if self.inline or self.marks:
            self._flush()
        self.heading = 0
        if self.flattened.get(tag):
            self.flattened[tag] -= 1
        else:
            self._end_container(tag)

    def _end_container(self, tag: str) -> None:
        """Ends the nearest open container of this tag and what is open inside it; none is open: nothing happens."""
        if self.open[-1].tag == tag and len(self.open) > 1:
            self._pop()
            return
        barrier = _BARRIERS.get(tag, frozenset())
        for depth in range(len(self.open) - 1, 0, -1):
            if self.open[depth].tag == tag:
                while len(self.open) > depth:
                    self._pop()
                return
            if self.open[depth].tag in barrier:
                return

    def _break(self, _name: str, _attributes: str) -> None:
        self.inline.append(HARD_BREAK)

    def _rule(self, _name: str, _attributes: str) -> None:
        self._flush()
        blocks = self.open[-1].blocks
        blocks.append(("block", "---" if blocks else "___"))  # `- ---` would be a rule itself

    def _script(self, _name: str, _attributes: str) -> None:
        self._content(("</script", "</style"))

    def _stray(self, _name: str, _attributes: str) -> None:
        """Takes a closing tag that closes nothing."""

    def _content(self, ends: tuple[str, ...]) -> str:
        """The HTML up to a closing tag, behind which reading goes on; all the rest if there is none."""
        pieces, start = self.pieces, self.next
        # An unclosed <code> ends with its block, lest it swallow the rest of the post.
        for index in range(start + 1, len(pieces), 2):
            tag = pieces[index].lower()
            if tag.startswith(ends):
                self.next = index + 1
                return "".join(pieces[start:index])
            if tag in _ENDS_BLOCK and "</code" in ends:
                self.next = index - 1
                content, pieces[index - 1] = "".join(pieces[start:index]), ""
                return content
        self.next = len(pieces)
        return "".join(pieces[start:])

    def _open_mark(self, tag: str, _attributes: str) -> None:
        inline, marks, sign = self.inline, self.marks, _MARKS.get(tag, "")
        text = self._words(f"</{tag}>") if not marks else ""
        if text and text[0].isalnum() and text[-1].isalnum() and not (inline and inline[-1][-1] in "*~"):
            inline.append(f"{sign}{text}{sign}" if sign else f"<{tag}>{text}</{tag}>")
            self.next += 2
        elif len(marks) < MAX_MARKS:
            # Emphasis inside emphasis of its kind looks no different.
            again = sign and any(sign == _MARKS.get(mark[0]) for mark in marks)
            marks.append((tag, len(inline), _AGAIN if again else ""))
            if again:
                self._part()

    def _words(self, closing: str) -> str:
        """The text up to this closing tag, if it is Markdown as it stands and no tag is inside; or empty."""
        pieces, index = self.pieces, self.next
        if index + 1 >= len(pieces) or pieces[index + 1] != closing:
            return ""
        text = pieces[index]
        for sign in self.signs:
            if sign in text:
                return ""
        return "" if "\n" in text else text

    def _shows(self, address: str) -> bool:
        """Whether a link to this address shows just that."""
        pieces, index = self.pieces, self.next
        return (
            index + 1 < len(pieces)
            and pieces[index + 1] == "</a>"
            and _resolved(pieces[index]) == address
            and markdown.is_autolink(address)
        )

    def _paragraph(self, closing: str) -> str:
        """The text up to this closing tag, if it is a paragraph as it stands and no tag is inside; or empty."""
        pieces, index = self.pieces, self.next
        if index + 1 >= len(pieces) or pieces[index + 1] != closing:
            return ""
        text = pieces[index].strip(_SPACE)
        if not text or text[0] in _FIRST_SIGNS or "\n" in text or text.isspace():
            return ""
        for sign in self.signs:
            if sign in text:
                return ""
        return text

    def _close_mark(self, tag: str, _attributes: str = "") -> None:
        for mark in self.marks:
            if mark[0] == tag:
                while self._finish_mark() != tag:
                    pass
                return
        self._part()

    def _link(self, _name: str, attributes: str) -> None:
        inline = self.inline
        if self.marks:
            self._close_mark("a")  # a link ends where another begins
        if match := _PLAIN_LINK.fullmatch(attributes):
            target = address = match[1]
        else:
            given = _attributes(attributes)
            target = _target(given, "href")
            if not target:
                self._part()
                return
            address = markdown.address(target, _title(given))
        text = self._words("</a>")
        if text and text == text.strip() and not (inline and inline[-1][-1] == "!"):
            shown = text == address and markdown.is_autolink(text)
            inline.append(f"<{address}>" if shown else f"[{text}]({address})")
            self.next += 2
            return
        if self._shows(address):
            inline.append(f"<{address}>")
            self.next += 2
            return
        if len(self.marks) < MAX_MARKS:
            self.marks.append(("a", len(inline), address))

    def _image(self, _name: str, attributes: str) -> None:
        given = _attributes(attributes)
        alt = markdown.as_text(given.get("alt", ""), True, self._dollar_follows, markdown.no)
        address = markdown.address(_target(given, "src"), _title(given))
        self.inline.append(f"![{markdown.in_one_line(alt, ' ')}]({address})")

    def _finish_mark(self) -> str:
        """Ends the innermost open mark; white space at its ends moves outside, where Markdown wants it."""
        tag, start, address = self.marks.pop()
        inline = self.inline
        if address == _AGAIN:
            self._part()
            return tag
        self._settle(start)
        content = "".join(inline[start:])
        del inline[start:]
        core = content.strip()
        start = content.find(core) if core else len(content)
        if start:
            inline.append(content[:start])
        if not core:
            self._part()
            return tag
        tail = content[start + len(core) :]
        core = markdown.in_one_piece(core)
        if tag == "a":
            if inline and inline[-1][-1:] == "!":  # or it would be an image
                inline[-1] = inline[-1][:-1] + "\\!"
            inline.append(f"[{core}]({address})")
        elif tag in _MARKS and markdown.flanks(inline[-1][-1] if inline else "", core[0], nested=self._is_nested(tag)):
            if not core[-1].isalnum():
                self.unsure.append((len(inline), tag))
            inline.append(f"{_MARKS[tag]}{core}{_MARKS[tag]}")
        else:
            inline.append(f"<{tag}>{core}</{tag}>")
        if tail:
            inline.append(tail)
        return tag

    def _part(self) -> None:
        """Keeps the text in front of a tag that becomes nothing from meaning something with the text behind it."""
        following = self.pieces[self.next][:1] if self.next < len(self.pieces) else ""
        if self.inline and not following.isspace() and _COULD_GO_ON.search(self.inline[-1][-40:]):
            self.inline.append(_NOTHING)

    def _is_nested(self, tag: str) -> bool:
        return any(mark[0] in _MARKS and _MARKS[mark[0]][0] == _MARKS[tag][0] for mark in self.marks)

    def _settle(self, start: int = 0) -> None:
        """Emphasis from this piece on that its surroundings would not let end becomes HTML."""
        inline = self.inline
        while self.unsure and self.unsure[-1][0] >= start:
            index, tag = self.unsure.pop()
            following = inline[index + 1][:1] if index + 1 < len(inline) else ""
            piece, sign = inline[index], len(_MARKS[tag])
            if not markdown.flanks(following, piece[-sign - 1]):
                inline[index] = f"<{tag}>{piece[sign:-sign]}</{tag}>"

    def _flush(self) -> None:
        """Ends the line in the making: what it holds becomes a block of the innermost container."""
        while self.marks:
            self._finish_mark()
        if not self.inline:
            return
        if self.unsure:
            self._settle()
        text = ("".join(self.inline) if len(self.inline) > 1 else self.inline[0]).strip(_SPACE)
        self.inline.clear()
        if not text or text.isspace():
            return
        container = self.open[-1]
        if self.heading:
            container.blocks.append(("block", markdown.heading(self.heading, text)))
        elif container.tag in _CELLS:
            container.blocks.append(("text", markdown.in_one_line(text, "<br>")))
        elif markdown.is_one_plain_line(text):
            container.blocks.append(("text", text))
        else:
            container.blocks += [("text", part) for part in markdown.paragraphs(text)]

    def _code_span(self, _name: str, _attributes: str) -> None:
        inline = self.inline
        if code := _raw_text(self._content(("</code",))):
            if inline and inline[-1][-1] == "`":  # the two signs would be read as one
                inline.append(_NOTHING)
            inline.append(markdown.code_span(code))
        else:
            self._part()

    def _code_block(self, _name: str, attributes: str) -> None:
        self._flush()
        content = self._content(("</pre",))
        language = _LANGUAGE.search(attributes) or _LANGUAGE.search(content[: content.find(">") + 1])
        name = "" if language is None or language[1] == "none" else language[1]
        code = _raw_text(content.removeprefix("\n"))
        self.open[-1].blocks.append(("block", markdown.code_block(code.removesuffix("\n"), name)))

    def _pop(self) -> None:
        """Ends the innermost container and hands its Markdown to the one around it."""
        container = self.open.pop()
        parent, tag, blocks = self.open[-1], container.tag, container.blocks
        if tag == "blockquote" and blocks:
            parent.blocks.append(("block", quoted(blocks, spoiler="spoiler" in container.attributes)))
        elif tag == "li" and blocks:
            parent.loose = parent.loose or container.loose
            item = joined(blocks, tight=not container.loose)
            # An item outside any list is a bullet by itself.
            parent.blocks.append(("item", item) if parent.tag in _LISTS else ("-", prefixed(item, "- ", "  ")))
        elif tag in _LISTS and blocks:
            start = _attributes(container.attributes).get("start", "1") if tag == "ol" else None
            before = parent.blocks[-1][0] if parent.blocks else ""
            parent.blocks += listed(blocks, start, before, loose=container.loose)
        elif tag in _CELLS:
            if parent.tag == "tr":
                parent.parts.append(blocks)
            else:
                parent.blocks += blocks
        elif tag == "tr":
            if parent.tag == "table":
                parent.parts.append(container.parts)
            else:
                parent.blocks += [block for cell in container.parts for block in cell]
            parent.blocks += blocks
        elif tag == "table":
            parent.blocks += blocks + table(container.parts)


def _resolved(text: str) -> str:
    """The text with its entities resolved once; a number that is no character's becomes U+FFFD, however long it is."""
    return unescape(_LONG_REFERENCE.sub("\ufffd", text)) if "&" in text else text


def _attributes(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTE.findall(text):
        value = double or single or bare
        found.setdefault(name.lower(), _ENTITY.sub(lambda match: _resolved(match[0]), value) if "&" in value else value)
    return found


def _target(given: dict[str, str], name: str) -> str:
    """An address as browsers take it: without white space at its ends, line breaks and tabs."""
    target = given.get(name, "").strip(_SPACE)
    return target.replace("\n", "").replace("\t", "") if "\n" in target or "\t" in target else target


def _title(given: dict[str, str]) -> str:
    return " ".join(given["title"].split()) if "title" in given else ""


def _raw_text(html: str) -> str:
    """The characters of a code element: tags off, line breaks kept, entities resolved once."""
    if "<" in html:
        html = _ANY_TAG.sub("", _BREAK.sub("\n", html))
    return _resolved(html)


Take = Callable[[_Renderer, str, str], None]
_OPENING: dict[str, Take] = {
    "p": _Renderer._open_paragraph,
    **dict.fromkeys((*_BLOCKS, *_HEADINGS), _Renderer._open_block),
    **dict.fromkeys(_CONTAINERS, _Renderer._open_container),
    **dict.fromkeys((*_MARKS, *_AS_HTML), _Renderer._open_mark),
    **dict.fromkeys(("script", "style"), _Renderer._script),
    "a": _Renderer._link,
    "code": _Renderer._code_span,
    "pre": _Renderer._code_block,
    "br": _Renderer._break,
    "img": _Renderer._image,
    "hr": _Renderer._rule,
}
_CLOSING: dict[str, Take] = {
    **dict.fromkeys(_OPENING, _Renderer._stray),
    **dict.fromkeys(("p", *_BLOCKS, *_HEADINGS), _Renderer._close_block),
    **dict.fromkeys(_CONTAINERS, _Renderer._close_container),
    **dict.fromkeys(("a", *_MARKS, *_AS_HTML), _Renderer._close_mark),
}
# Most tags, as they stand in the HTML: (what takes them, name, attributes).
_MEANINGS = {f"<{name}>": (take, name, "") for name, take in _OPENING.items()}
_MEANINGS |= {f"</{name}>": (take, name, "") for name, take in _CLOSING.items()}


def _meaning(tag: str) -> tuple[Take | None, str, str]:
    """What takes a tag, its name and its attributes. Nothing takes one without a meaning."""
    if tag.startswith("<a "):
        return _Renderer._link, "a", tag[2:-1]
    match = _TAG.match(tag)
    if match is None:
        return None, "", ""
    closing, name, attributes = match.groups()
    name = name.lower()
    return (_CLOSING if closing else _OPENING).get(name), name, attributes
