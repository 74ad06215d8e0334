"""What of a text in Markdown is prose, what is code, and what is links.

Every function takes time linear in the text's length: runs of backticks are paired in one pass, and no pattern goes
back over what it has taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# The address may hold one level of balanced parentheses, as those of Wikipedia do, and a title.
_TARGET = r"\([^()\s]*+(?:\([^()\s]*+\)[^()\s]*+)*+(?:\s++\"[^\"\n]*+\")?+\s*+\)"
_IMAGE = rf"!\[[^\[\]]*+\]{_TARGET}"
_WORDS = rf"(?:{_IMAGE}|[^\[\]])*+"
_BARE = r"<?(?:https?|ftp)://[^\s<>]++>?|<mailto:[^\s<>]++>"

_TICKS = re.compile("`+")
_LETTER = re.compile(r"[^\W_]")
_LINK_OR_LETTER = re.compile(rf"({_IMAGE}|\[{_WORDS}\]{_TARGET}|{_BARE})|(\$\$?[^$\n]++\$)|[^\W_]")
_AROUND_WORDS = re.compile(rf"{_IMAGE}|{_BARE}|\[([^\[\]]*+)\]{_TARGET}")
_TAG_OR_FORMULA = re.compile(
    r"</?[a-zA-Z][^<>\n]{0,100}>|\$\$[^$]++\$\$|\$[^$\n]++\$|\\begin\{\w{1,20}\*?\}|\\[a-zA-Z]++"
)


def is_only_links(text: str, letters: int) -> bool:
    """Whether a text has a link or an image, and outside of them neither code nor a formula and fewer than so many
    letters and digits.
    """
    linked, seen = False, 0
    for is_code, part in _parts(text):
        if is_code and _LETTER.search(part):
            return False
        for match in _LINK_OR_LETTER.finditer(part):
            linked |= match.lastindex == 1
            seen += match.lastindex is None
            if seen == letters or match.lastindex == 2:
                return False
    return linked


def prose(text: str) -> str:
    """The text without code, formulas, tags, images and addresses; the words of links stay."""
    rest = " ".join(part for is_code, part in _parts(text) if not is_code)
    words = _AROUND_WORDS.sub(lambda match: match[1] or " ", rest)
    return _TAG_OR_FORMULA.sub(" ", words)


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """The parts of a text in their order, each with whether it is code."""
    last = 0
    for start, stop in _code(text) if "`" in text else ():
        yield False, text[last:start]
        yield True, text[start:stop]
        last = stop
    yield False, text[last:]


def _code(text: str) -> Iterator[tuple[int, int]]:
    """Where code begins and ends, its backticks included: from a run of them to the next run of the same length."""
    runs = [match.span() for match in _TICKS.finditer(text)]
    nearest: dict[int, int] = {}
    partner = [0] * len(runs)  # of each run, the number of the one that ends it; 0 is none, since it ends nothing
    for at in range(len(runs) - 1, -1, -1):
        length = runs[at][1] - runs[at][0]
        partner[at] = nearest.get(length, 0)
        nearest[length] = at
    at = 0
    while at < len(runs):
        if partner[at]:
            yield runs[at][0], runs[partner[at]][1]
            at = partner[at]
        at += 1
