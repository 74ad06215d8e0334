"""Small dumps for tests, written as Stack Exchange writes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

Row = Mapping[str, str]
REPOSITORY = Path(__file__).resolve().parents[2]
_ESCAPES = {'"': "&quot;", "\n": "&#xA;", "\r": "&#xD;", "\t": "&#x9;"}


def table(name: str, rows: Iterable[Row], *, head: str = "") -> bytes:
    lines = ['<?xml version="1.0" encoding="utf-8"?>' + head, f"<{name.lower()}>"]
    lines += [
        "  <row " + " ".join(f'{key}="{escape(value, _ESCAPES)}"' for key, value in row.items()) + " />" for row in rows
    ]
    return b"\xef\xbb\xbf" + "\r\n".join([*lines, f"</{name.lower()}>", ""]).encode()


def question(number: int, **more: str) -> dict[str, str]:
    return {
        "Id": str(number),
        "PostTypeId": "1",
        "CreationDate": "2019-05-01T10:00:00.000",
        "Score": "3",
        "Body": f"<p>Question {number}?</p>",
        "Title": f"Title {number}",
        "Tags": "<one><two>",
        "OwnerUserId": "7",
    } | more


def answer(number: int, parent: int, **more: str) -> dict[str, str]:
    return {
        "Id": str(number),
        "PostTypeId": "2",
        "ParentId": str(parent),
        "CreationDate": "2019-05-02T10:00:00.000",
        "Score": "1",
        "Body": f"<p>Answer {number}.</p>",
        "OwnerUserId": "8",
    } | more


def site(folder: Path, posts: Iterable[Row], users: Iterable[Row] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Posts.xml").write_bytes(table("Posts", posts))
    if users is not None:
        (folder / "Users.xml").write_bytes(table("Users", users))
    return folder


def shared_dumps() -> Path:
    """The folder of real dumps; skips the test where it is absent."""
    given = os.environ.get("STACKLLAMA_SHARED_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not (folder / "expected.json").exists():
        pytest.skip(f"no real dumps in {folder}: set STACKLLAMA_SHARED_DATA to the folder that has expected.json")
    return folder
