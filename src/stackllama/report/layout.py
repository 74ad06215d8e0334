"""What all pages have in common: templates that escape, signs made visible, and which addresses may be links.

Texts of strangers pass through `template`'s escaping, or through `markdown.to_html`; nothing else makes markup.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

TEXT_LIMIT = 20_000
"""Characters of one question or answer that are shown; what is cut is said."""

_TURNING = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Invisible signs that turn the direction of writing."""
PICTURES: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **{code: f"[U+{code:04X}]" for code in (*range(0x80, 0xA0), *_TURNING)},
}


def template(name: str) -> Template:
    """A template of this package. All that is put into it is escaped (but `Markup`), and its control characters are
    shown as pictures (␛), since HTML has no place for them.
    """
    environment = Environment(
        loader=PackageLoader("stackllama.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def pictured(text: str) -> str:
    """The text with pictures of control characters, and with the names of signs that turn the direction of writing."""
    return text.translate(PICTURES)


def is_web(url: str) -> bool:
    """Whether an address is plain http or https, so that a link may be made of it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def clipped(text: str) -> tuple[str, int]:
    """The beginning of a text that is shown, and how many characters are not."""
    return text[:TEXT_LIMIT], max(0, len(text) - TEXT_LIMIT)


def _visible(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else pictured(value)
