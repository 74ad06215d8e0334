"""Questions with their answers, each text with its attribution; and what holds for the rows that they come from."""

from __future__ import annotations

from dataclasses import dataclass

from stackllama.data.text.markup import rendered

COMMUNITY = -1
"""The user id under which Stack Exchange files what nobody in particular owns."""

LONGEST_BODY = 300_000
"""Characters of HTML; Stack Exchange allows 30,000 of Markdown."""
TOO_LONG = f"{{}} has over {LONGEST_BODY} characters, or far more as Markdown"
LONGEST_FIELD = 2000
"""Characters of a title, a name, all tags; Stack Exchange allows some 150."""


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


def body_text(html: str) -> tuple[str, int] | None:
    """The body of a post as Markdown, and the length that a reader sees; None where it is too long (`TOO_LONG`)."""
    if len(html) > LONGEST_BODY:
        return None
    text, length = rendered(html)
    # The signs before each line of nested lists, say, can make a hundred times as much of a text.
    return (text, length) if len(text) <= 4 * len(html) + 1000 else None


def license_of(day: str) -> str:
    """The licence of what was written on `day` ("2011-04-08"), where the row itself does not name one."""
    if day < "2011-04-08":
        return "CC BY-SA 2.5"
    return "CC BY-SA 3.0" if day <= "2018-05-01" else "CC BY-SA 4.0"
