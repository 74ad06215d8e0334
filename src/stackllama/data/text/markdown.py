r"""Pieces of Markdown that read back as what they were made of: text, code, addresses.

A backslash is set where CommonMark (with tables and strikethrough) would read a sign, and nowhere else: `2 * 3`, `a_b`,
`x < y`, `AT&T` and `#5` stay. What cannot be known piece by piece is taken for the worse: a `*` at the end of a piece
may meet emphasis.

Formulas stay byte for byte. They are `$$...$$`, `\(...\)`, `\[...\]`, `\begin{x}...\end{x}` and `$...$` in one piece of
text, without a blank line; the opening sign follows no backslash and no `$`. So that money is none, `$...$` has no
digit behind it, and white space at its ends only if it has a sign of TeX inside: `^`, `_`, `{` or a backslash with a
letter. Any other `$` is escaped if one follows in its block that it could pair with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html.entities import html5
from string import punctuation
from unicodedata import category

SIGNS = "\\`*_[]&~$"
"""What can be a sign of Markdown within a line, beside `<`. Text without any is Markdown as it stands."""

# Three characters that no text has (see `RESERVED`) stand for others while a block is in the making.
FORMULA_LINE = "\x00"
"""A line break inside a formula."""
HARD_BREAK = "\x1d"
"""A `<br>`. Python takes the character for white space."""
_FORMULA = "\x02"
RESERVED = (FORMULA_LINE, HARD_BREAK, _FORMULA)

# Each part is possessive, or ended by the sign that could open the next: no input takes more than linear time. Each
# alternative begins with the sign itself, which lets Python's search skip everything else.
_DOLLARS_OR_BRACKETS = r"""
      \$ (?<![\\$]\$) \$ (?!\$) (?: [^\\$]++ | \\. | \$(?!\$) | \${3,}+ )++ \$\$ (?!\$)
    | \$ (?<![\\$]\$) (?!\$) (?: (?: [^\\$^_{]++ | \\[^a-zA-Z^_{] | \${2,}+ )*+ (?: \\?[\^_{] | \\[a-zA-Z] )
                                 (?: [^\\$]++ | \\. | \${2,}+ )*+
                               | (?!\s) (?: [^\\$]++ | \\. | \${2,}+ )++ (?<!\s)
                             ) \$ (?!\$) (?!\d)
    | \\ (?<!\\\\) \( (?: [^\\]++ | \\[^()] )*+ \\\)
    | \\ (?<!\\\\) \[ (?: [^\\]++ | \\[^\[\]] )*+ \\\]
"""
_ENVIRONMENT = r"| \\ (?<!\\\\) begin\{ ([^{}\s]++) \} (?: [^\\]++ | \\(?!end\{\1\}). )*+ \\end\{\1\}"
_FORMULAS = re.compile(_DOLLARS_OR_BRACKETS, re.DOTALL | re.VERBOSE)
_FORMULAS_AND_ENVIRONMENTS = re.compile(_DOLLARS_OR_BRACKETS + _ENVIRONMENT, re.DOTALL | re.VERBOSE)
# Most formulas, found faster. Where nothing that could be a sign is left without them, they are all there is.
_SURELY = re.compile(r"\$\$[^$]+(?<!\\)\$\$(?!\$)|\$(?![\s$])[^$]+(?<![\s\\])\$(?![\d$])")
_BEGIN_OR_END = re.compile(r"\\(?:(begin|end)\{([^{}\s]+)\}|.)", re.DOTALL)
_BLANK_LINE = re.compile(r"(\n[ \t]*\n\s*)")

_IN_LINE = r"""
      \\ (?=[!-/:-@\[-`{-~\x02]|begin\{|[ \t]*+\n|\Z)                  # before punctuation, at the end of a line
    | ``*+
    | \* (?<![ \t*]\*) \**+ | \* (?<!\*\*) \**+ (?![ \t])                # but not `2 * 3`
    | _ (?<!\w_) _*+ (?![ \t]) | _ (?<![ \t_]_) _*+ (?![^\W_])           # but neither `a_b` nor `a _ b`
    | ~ (?:~++|\Z) | ~ (?<![\s\S]~)
    | < (?=[a-zA-Z/!?]|\Z)
    | & (?:\#[0-9]{1,7}|\#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31}) ;
"""
_ANY_SIGN = re.compile(r"[\\`*_\[\]&<~$]")
_SIGN = re.compile(_IN_LINE + r"| \](?=\()", re.VERBOSE)
_SIGN_OR_BRACKET = re.compile(_IN_LINE + r"| [\[\]]", re.VERBOSE)
_PAIRED = "*_~`"  # what means nothing where it is alone
_NO_BRACKETS = re.compile(r"[^\[\]]+")

# In front of which a backslash keeps a line from beginning a block; behind the digits of a number, and behind `[x]`.
_BLOCK_SIGN = r"""
      \#{1,6} (?=[ \t\n]|\Z)
    | >
    | [-+*] (?=[ \t\n]|\Z)
    | ([-_*]) (?:[ \t]*+\1){2,}+ (?=[ \t]*+(?:\n|\Z))
"""
FIRST_SIGNS = frozenset("#>-+*_[0123456789")
_FIRST_LINE = re.compile(
    _BLOCK_SIGN + r"| [0-9]{1,9} (?=[.)](?:[ \t\n]|\Z)) | \[ (?:[^\[\]\\]++|\\.)*+ \] (?=:)", re.VERBOSE | re.DOTALL
)
# Further lines of a paragraph begin a list only with 1; but they may underline a heading or the head of a table.
_LATER_LINE = re.compile(
    rf"\n (?: {_BLOCK_SIGN} | 0{{0,8}}1 (?=[.)][ \t]) | = (?==*+[ \t]*+(?:\n|\Z)) | [-|:] (?=[-:|\ \t]*+(?:\n|\Z)) )",
    re.VERBOSE,
)
_GAP = re.compile(r"[\n\x1d][ \t\n\x1d]*")
# Where a line might begin or end with more than words; most lines do not.
_ODD_LINE = re.compile(r"\n(?:(?<=[ \t]\n)|[ \t\n#>*+=|:_0-9-])")
_TICKS = re.compile(r"`+")
_ADDRESS_SIGN = re.compile(r"\\(?=[!-/:-@\[-`{-~]|\Z)|[<>]|&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")
_TITLE_SIGN = re.compile(r"\\(?=[!-/:-@\[-`{-~]|\Z)|\"|&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")
_NEEDS_BRACKETS = re.compile(r"[\x00-\x20\x7f]|\A<")
_AUTOLINK = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{1,31}:[^\x00-\x20<>]*")
_PUNCTUATION = frozenset(punctuation)


def as_text(text: str, in_link: bool, dollar_follows: Callable[[], bool], is_alone: Callable[[str], bool]) -> str:
    """Text, its entities resolved, as a piece of a line.

    `in_link`: it belongs to the text of a link or an image, whose brackets must match. `dollar_follows` says whether a
    `$` comes later in the same block, and `is_alone` whether a sign comes nowhere else in it.
    """
    if "$" not in text and "\\" not in text:
        return _escaped(text, in_link, dollar_follows, is_alone)
    if "\n" in text and len(parts := _BLANK_LINE.split(text)) > 1:  # no formula reaches over a blank line
        last = as_text(parts.pop(), in_link, dollar_follows, no)
        return "".join(as_text(part, in_link, lambda: True, no) for part in parts) + last
    rest = _SURELY.sub("", text)
    if not _ANY_SIGN.search(rest):
        return _SURELY.sub(_on_one_line, text) if "\n" in text else text
    formulas: list[str] = []

    def taken(match: re.Match[str]) -> str:
        formulas.append(match[0])
        return _FORMULA

    pattern = _FORMULAS_AND_ENVIRONMENTS if "\\begin{" in text and _environments_end(text) else _FORMULAS
    words = pattern.sub(taken, text)
    escaped = _escaped(
        words, in_link, dollar_follows, lambda sign: words.count(sign) == text.count(sign) and is_alone(sign)
    )
    if not formulas:
        return escaped
    first, *others = escaped.split(_FORMULA)
    return first + "".join(
        [formula.replace("\n", FORMULA_LINE) + other for formula, other in zip(formulas, others, strict=True)]
    )


def _on_one_line(match: re.Match[str]) -> str:
    return match[0].replace("\n", FORMULA_LINE)


def _environments_end(text: str) -> bool:
    r"""Whether an `\end` follows each `\begin` but a few. From each without one the text is read to its end in vain."""
    ended: set[str] = set()
    without_end = 0
    for match in reversed(list(_BEGIN_OR_END.finditer(text))):
        if match[1] == "end":
            ended.add(match[2])
        elif match[1] and match[2] not in ended:
            without_end += 1
    return without_end < 10


def _escaped(text: str, in_link: bool, dollar_follows: Callable[[], bool], is_alone: Callable[[str], bool]) -> str:
    if not _ANY_SIGN.search(text):
        return text
    core = text.strip()  # white space at the ends may be moved away from it
    start = text.find(core)
    pattern = _SIGN_OR_BRACKET if in_link and not _brackets_match(core) else _SIGN
    # A backslash in front of another dollar sign will be doubled, and so no longer keep the first from meeting it.
    dollars = "$" in core and ("\\$" in core or dollar_follows())
    escaped = pattern.sub(_with_backslash, core)
    if dollars:
        escaped = escaped.replace("$", "\\$")
    if escaped == core:
        return text
    for sign in _PAIRED:
        if core.count(sign) == 1:
            before, _, after = escaped.partition(sign)
            if (len(before) - len(before.rstrip("\\"))) % 2 and is_alone(sign):
                escaped = before[:-1] + sign + after
    return text[:start] + escaped + text[start + len(core) :]


def no(_sign: str) -> bool:
    """For signs that may come elsewhere."""
    return False


def _with_backslash(match: re.Match[str]) -> str:
    found = match[0]
    if found == "[":
        return "&#91;"  # as `\\[` could begin a formula
    if len(found) == 1:
        return "\\" + found
    if found[0] == "&":
        return "\\" + found if found[1] == "#" or found[1:] in html5 else found
    return "\\" + "\\".join(found)


def _brackets_match(text: str) -> bool:
    depth = 0
    for sign in _NO_BRACKETS.sub("", text):
        depth += 1 if sign == "[" else -1
        if depth < 0:
            return False
    return depth == 0 and "](" not in text


def in_one_line(text: str, hard_break: str) -> str:
    """Inline Markdown without line breaks, for headings and cells."""
    if HARD_BREAK in text or "\n" in text:
        text = _GAP.sub(lambda match: hard_break * match[0].count(HARD_BREAK) or " ", text)
    return text.replace(FORMULA_LINE, " ")


def in_one_piece(text: str) -> str:
    """Inline Markdown without blank lines, since emphasis and links end there."""
    if HARD_BREAK in text or "\n" in text:
        text = _GAP.sub(lambda match: HARD_BREAK if HARD_BREAK in match[0] else "\n", text)
    return text


def is_one_plain_line(text: str) -> bool:
    """Whether inline Markdown is a paragraph as it stands."""
    return text[0] not in FIRST_SIGNS and "\n" not in text and HARD_BREAK not in text and FORMULA_LINE not in text


def paragraphs(text: str) -> list[str]:
    """Inline Markdown as paragraphs, one unless a blank line or two `<br>` divide it; no line begins a block."""
    parts = [text]
    odd = HARD_BREAK in text or _ODD_LINE.search(text) is not None
    if odd:
        lines = [line.rstrip(" \t") for line in text.split("\n")]
        parts = _GAP.sub(_gap, "\n".join(lines)).split("\n\n")
    for index, part in enumerate(parts):
        if part[0] in FIRST_SIGNS and (match := _FIRST_LINE.match(part)):
            part = _harmless(match[0]) + part[match.end() :]
        if odd:
            part = _LATER_LINE.sub(lambda match: "\n" + _harmless(match[0][1:]), part)
        parts[index] = part.replace(FORMULA_LINE, "\n")
    return parts


def _gap(match: re.Match[str]) -> str:
    gap = match[0]
    breaks = gap.count(HARD_BREAK)
    if breaks == 1:
        return "  \n"
    return "\n\n" if breaks or gap.count("\n") > 1 else "\n"


def _harmless(sign: str) -> str:
    """The beginning of a line that would begin a block, so that it begins none."""
    if sign[0] in "[0123456789":
        return sign + "\\"
    return sign.replace("*", "\\*") if sign[0] == "*" else "\\" + sign


def heading(level: int, text: str) -> str:
    """Inline Markdown as a heading, which is one line."""
    text = in_one_line(text, " ")
    before = text.rstrip("#")
    if before != text and before[-1:] in ("", " ", "\t"):  # signs at the end would be left out
        text = f"{before}\\{text[len(before) :]}"
    return f"{'#' * level} {text}"


def code_span(code: str) -> str:
    """Code within a line; its line breaks become the spaces that HTML and Markdown show for them."""
    code = code.replace("\n", " ")
    ticks = "`" * (_longest_run(code) + 1)
    # CommonMark takes one space off each end when both are there, so one more keeps the content.
    pad = " " if code[0] == "`" or code[-1] == "`" or (code[0] == code[-1] == " " and code.strip(" ")) else ""
    return f"{ticks}{pad}{code}{pad}{ticks}"


def code_block(code: str, language: str) -> str:
    """Code in a fence that is longer than any run of backticks inside; `language` may be empty."""
    ticks = "`" * max(3, _longest_run(code) + 1)
    return f"{ticks}{language}\n{code}\n{ticks}"


def _longest_run(code: str) -> int:
    return max((len(run) for run in _TICKS.findall(code)), default=0) if "`" in code else 0


def address(target: str, title: str) -> str:
    """The target of a link or an image, with its title if there is one, as it stands in parentheses."""
    bare = not _NEEDS_BRACKETS.search(target) and _parentheses_match(target)
    if "\\" in target or "&" in target or "<" in target or ">" in target:
        target = _ADDRESS_SIGN.sub(_with_backslash, target)
    if not bare or (title and not target):
        target = f"<{target}>"
    return f'{target} "{_TITLE_SIGN.sub(_with_backslash, title)}"' if title else target


def _parentheses_match(target: str) -> bool:
    if "(" not in target and ")" not in target:
        return True
    depth = 0
    for sign in target:
        depth += (sign == "(") - (sign == ")")
        if not 0 <= depth < 10:
            return False
    return depth == 0


def is_autolink(target: str) -> bool:
    """Whether `<target>` is a link that shows its own address."""
    return _AUTOLINK.fullmatch(target) is not None


def flanks(outside: str, inside: str, *, nested: bool = False) -> bool:
    """Whether a sign of emphasis between these two characters begins it, or ends it if they stand the other way round.

    Nothing outside: the line ends there. `nested`: where it begins it may not also end, as it would end what is around.
    """
    if outside in "*~":
        return outside == ""
    if outside in " \t\n\x1d\xa0" or category(outside) == "Zs":
        return True
    if nested:
        return outside in _PUNCTUATION and inside.isalnum()
    return outside in _PUNCTUATION or inside.isalnum()
