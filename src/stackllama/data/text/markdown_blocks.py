"""Blocks of Markdown inside each other: quotes, lists, tables."""

from __future__ import annotations

Block = tuple[str, str]
"""What a block is ("text", "item", "block", or the sign of a list: "-", "*", ".", ")"), and its Markdown."""

_BULLETS = ("-", "*")
_NUMBERS = (".", ")")


def prefixed(text: str, first: str, following: str) -> str:
    """The text with `first` before its first line and `following` before the others; empty lines get no trailing
    space.
    """
    if text and "\n" not in text:
        return first + text
    head, *rest = text.split("\n")
    lines = [(first + head) if head else first.rstrip(" ")]
    lines += [(following + line) if line else following.rstrip(" ") for line in rest]
    return "\n".join(lines)


def joined(blocks: list[Block], *, tight: bool) -> str:
    """The blocks, a blank line between them; in a tight item a list inside follows its text at once."""
    if len(blocks) == 1:
        return blocks[0][1]
    parts: list[str] = []
    for index, (kind, text) in enumerate(blocks):
        if index:
            # Only a list that begins with 1 may follow text without a blank line.
            at_once = kind in _BULLETS or (kind in _NUMBERS and text.startswith(("1.", "1)")))
            parts.append("\n" if tight and at_once and blocks[index - 1][0] == "text" else "\n\n")
        parts.append(text)
    return "".join(parts)


def quoted(blocks: list[Block], *, spoiler: bool) -> str:
    """A quote; a spoiler begins with `>!`, on a line of its own where no text comes first."""
    text = joined(blocks, tight=False)
    if not spoiler:
        return prefixed(text, "> ", "> ")
    return prefixed(text if blocks[0][0] == "text" else "\n\n" + text, ">! ", "> ")


def listed(blocks: list[Block], start: str | None, before: str, *, loose: bool) -> list[Block]:
    """The list, behind what stood outside its items.

    `start` is its first number as it was given, None for bullets; `before` is what the block before is: the list takes
    another sign than that, or the two would be one. `loose`: blank lines between the items.
    """
    signs = _BULLETS if start is None else _NUMBERS
    sign = signs[1] if before == signs[0] else signs[0]
    number = int(start) if start and start.isascii() and start.isdigit() and len(start) < 9 else 1
    outside: list[Block] = []
    items: list[list[str]] = []
    for kind, text in blocks:
        if kind == "item":
            first = f"{sign} " if start is None else f"{number}{sign} "
            number += 1
            items.append([prefixed(text, first, " " * len(first))])
        elif items:  # text or a list straight inside the list
            indent = " " * len(first)
            items[-1].append(prefixed(text, indent, indent))
        else:
            outside.append((kind, text))
    between = "\n\n" if loose else "\n"
    return [*outside, (sign, between.join(["\n\n".join(item) for item in items]))] if items else outside


def table(rows: list[list[list[Block]]]) -> list[Block]:
    """A pipe table with the first row as its head; what the cells hold, if a cell holds more than text."""
    blocks = [block for row in rows for cell in row for block in cell]
    if any(kind != "text" or "\n" in text for kind, text in blocks) or not blocks:
        return blocks
    width = max(len(row) for row in rows)
    # Filled up with empty cells, a few long rows among many short ones would take any amount of memory.
    if width * len(rows) > 4 * sum(map(len, rows)) + 1000:
        return blocks
    lines = []
    for row in rows:
        if row:
            # A reader takes the backslash off before anything else, so it is right in code and formulas too.
            cells = ["<br>".join([text for _, text in cell]).replace("|", "\\|") for cell in row]
            lines.append("| " + " | ".join(cells + [""] * (width - len(row))) + " |")
    lines.insert(1, "|" + " --- |" * width)
    return [("block", "\n".join(lines))]
