"""Questions with their answers, each text with its attribution; and the rows of Posts and Users that they come from.

Every row is judged and converted on its own (`parse_post`, `parse_user`: pure functions); what is left out has a named
reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from stackllama.data.markup import plain_length, to_markdown

COMMUNITY = -1
"""The user id under which Stack Exchange files what nobody in particular owns."""

FABRICATED = frozenset({1000000001, 1000000010})
"""Ids of rows that some dumps of 2025-06-30 hold and no site ever had."""

LONGEST_BODY = 300_000
"""Characters of HTML; Stack Exchange allows 30,000 of Markdown."""
TOO_LONG = f"{{}} has over {LONGEST_BODY} characters, or far more as Markdown"
LONGEST_FIELD = 2000
"""Characters of a title, a name, all tags; Stack Exchange allows some 150."""

_WHOLE = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_DATE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z?", re.ASCII)
_TAGS = re.compile(r"[^<>|]+")


@dataclass(frozen=True, slots=True)
class Attribution:
    """Whom to name, and under which licence, wherever the text goes (CC BY-SA asks for all of it)."""

    url: str
    author: str
    author_id: int | None
    profile_url: str | None
    license: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `text` is Markdown; `date` is "2012-01-31T12:00:00.000" in UTC.

    `length` is what a reader sees, in characters: no tags, no addresses (`markup.plain_length`). None for a text that
    never was HTML: its length is then that of `text`.
    """

    id: int
    text: str
    votes: int
    accepted: bool
    date: str
    attribution: Attribution
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers of one question, as indices into its `answers`; `gap` is the difference of their scores, at least
    1; `margin` is how far apart a reward model should put them, in reward, before the loss of the pair is what it would
    be at no difference.
    """

    better: int
    worse: int
    gap: int
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answers, which are sorted by id.

    `weight` is how much it counts in the loss of a reward model, beside 1. `cluster` names the smallest question,
    "site/id", of those that ask the same; empty where nobody has looked for them.
    """

    site: str
    id: int
    title: str
    text: str
    tags: tuple[str, ...]
    votes: int
    date: str
    attribution: Attribution
    answers: tuple[Answer, ...]
    pairs: tuple[Pair, ...] = ()
    weight: float = 1.0
    cluster: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, as a base model is pretrained on."""

    site: str
    id: int
    text: str
    attribution: Attribution


class Post(NamedTuple):
    """A row of Posts that is a question (`parent` is None) or an answer, before it is joined."""

    id: int
    parent: int | None
    accepted_answer: int | None
    title: str
    tags: list[str]
    text: str
    length: int
    votes: int
    date: str
    owner: int | None
    owner_name: str
    license: str


_SHORT = ("Title", "Tags", "OwnerDisplayName", "ContentLicense")


def parse_post(row: Mapping[str, str]) -> Post | str:
    """A question or an answer, or the reason why this row is neither. Depends on nothing but the row."""
    kind = row.get("PostTypeId", "")
    if kind not in ("1", "2"):
        return (
            f"post: PostTypeId {kind} is neither question nor answer"
            if _WHOLE.fullmatch(kind)
            else "post: no PostTypeId"
        )
    asks = kind == "1"
    post_id, votes = _whole(row, "Id"), _whole(row, "Score")
    parent = None if asks else _whole(row, "ParentId")
    date = _DATE.fullmatch(row.get("CreationDate", ""))
    if post_id is None or post_id < 1:
        return "post: no Id, or not a whole number"
    if post_id in FABRICATED:
        return "post: fabricated row"
    if votes is None:
        return "post: no Score, or not a whole number"
    if not asks and parent is None:
        return "answer: no ParentId, or not a whole number"
    if date is None:
        return "post: no CreationDate, or not a date"
    title, tags, name, terms = (row.get(field, "") for field in _SHORT)
    if max(len(title), len(tags), len(name), len(terms)) > LONGEST_FIELD:
        return f"post: over {LONGEST_FIELD} signs in a field"
    if "Body" not in row:
        return "post: no Body"
    text = body_text(row["Body"])
    if not text:
        return "post: empty Body" if text is not None else TOO_LONG.format("post: Body")
    return Post(
        id=post_id,
        parent=parent,
        accepted_answer=_whole(row, "AcceptedAnswerId") if asks else None,
        title=title.strip() if asks else "",
        tags=_TAGS.findall(tags) if asks else [],
        text=text,
        length=plain_length(row["Body"]),
        votes=votes,
        date=f"{date[1]}.{(date[2] or '')[:3]:0<3}",
        owner=_whole(row, "OwnerUserId"),
        owner_name=name.strip(),
        license=terms.strip() or license_of(date[1][:10]),
    )


def body_text(html: str) -> str | None:
    """The body of a post as Markdown; None where either is too long (`TOO_LONG`)."""
    if len(html) > LONGEST_BODY:
        return None
    text = to_markdown(html)
    # The signs before each line of nested lists, say, can make a hundred times as much of a text.
    return text if len(text) <= 4 * len(html) + 1000 else None


def parse_user(row: Mapping[str, str]) -> tuple[int, str] | str:
    """(id, display name) of a row of Users, or the reason why there is none."""
    user = _whole(row, "Id")
    if user is None:
        return "user: no Id, or not a whole number"
    if len(row.get("DisplayName", "")) > LONGEST_FIELD:  # it goes to each post of this user
        return f"user: over {LONGEST_FIELD} signs in a name"
    name = " ".join(row.get("DisplayName", "").split())
    return (user, name) if name else "user: no DisplayName"


def parse_link(row: Mapping[str, str]) -> tuple[int, int, int] | str:
    """(post, related post, kind) of a row of PostLinks, or the reason why there is none."""
    post, related, kind = (_whole(row, name) for name in ("PostId", "RelatedPostId", "LinkTypeId"))
    if post is None or related is None or kind is None or not 0 <= kind < 2**31:
        return "link: no PostId, RelatedPostId or LinkTypeId, or not a whole number"
    return post, related, kind


def license_of(day: str) -> str:
    """The licence of what was written on `day` ("2011-04-08"), where the row itself does not name one."""
    if day < "2011-04-08":
        return "CC BY-SA 2.5"
    return "CC BY-SA 3.0" if day <= "2018-05-01" else "CC BY-SA 4.0"


def _whole(row: Mapping[str, str], name: str) -> int | None:
    value = row.get(name, "")
    if value.isdigit() and value.isascii() and len(value) <= 18:  # what it is nearly always; a search takes longer
        return int(value)
    return int(value) if _WHOLE.fullmatch(value) else None
