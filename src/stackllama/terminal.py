"""What may be shown in a terminal: texts of strangers must not steer it."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """The text with control characters (but line breaks and tabs) and invisible signs, such as those that turn the
    direction of writing, written out: an escape becomes a backslash and x1b.
    """
    return "".join(c if _shows(c) else c.encode("unicode_escape").decode() for c in text)


def _shows(character: str) -> bool:
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"
