"""One post on its way through the cleaning, as `convert` sends it."""

from __future__ import annotations

import random
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stackllama.data.building.shuffle import POSTS
from stackllama.data.text.cleaning import Cleaning, clean_posts


@dataclass(frozen=True)
class Cleaned:
    """A post's text and title, None where it was dropped, and what was counted."""

    text: str | None
    title: str | None
    counts: dict[str, int]


def post(number: int = 1, text: str = "A text.", title: str = "", parent: int | None = None) -> dict[str, Any]:
    """A question, or an answer if it has a parent, as `parse_posts` makes it."""
    asked = {"question": number if parent is None else parent, "answers": parent is not None, "title": title}
    written = {"text": text, "length": len(text), "votes": 0, "date": "2020-01-01T00:00:00.000"}
    return {"id": number, **asked, "tags": [], **written, "owner_name": "", "license": "CC BY-SA 4.0"}


def posts_table(posts: list[dict[str, Any]], site: str) -> pa.Table:
    return pa.Table.from_pylist([{"site": site, **one} for one in posts], schema=POSTS)


def cleaned(text: str, title: str = "", *, how: Cleaning, answer: bool = False) -> Cleaned:
    """What becomes of a post."""
    counts: Counter[str] = Counter()
    given = posts_table([post(text=text, title=title, parent=7 if answer else None)], "site")
    rows = clean_posts(given, how, counts).to_pylist()
    row = rows[0] if rows else {"text": None, "title": None}
    return Cleaned(row["text"], row["title"], dict(counts))


def everything(mode: str = "mask") -> Cleaning:
    """Every kind of text masked, or its post dropped."""
    return Cleaning("break" if mode == "mask" else mode, mode, mode)


def drawn(prefix: str, length: int, characters: str = string.ascii_letters + string.digits, seed: int = 0) -> str:
    """A made-up secret. Put together here, so that no scanner of repositories takes a file for a leak."""
    return prefix + "".join(random.Random(seed).choices(characters, k=length))
