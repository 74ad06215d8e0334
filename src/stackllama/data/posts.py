"""Questions with their answers, each text with its attribution, out of the tables Posts and Users.

Rows may come in any order: every row is judged and converted on its own (`parse_post`, `parse_user`: pure functions),
then joined by id. The result is sorted by id, so it does not depend on the order of the rows. Whatever is left out is
counted under a named reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from stackllama.data.archive import TABLES, open_tables
from stackllama.data.dump import ByteStream, rows
from stackllama.data.markup import plain_length, to_markdown
from stackllama.errors import DumpError

COMMUNITY = -1
"""The user id under which Stack Exchange files what nobody in particular owns."""

FABRICATED = frozenset({1000000001, 1000000010})
"""Ids of rows that some dumps of 2025-06-30 hold and no site ever had."""

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


@dataclass(frozen=True, slots=True)
class Post:
    """A row of Posts that is a question (`parent` is None) or an answer, before it is joined."""

    id: int
    parent: int | None
    accepted_answer: int | None
    title: str
    tags: tuple[str, ...]
    text: str
    length: int
    votes: int
    date: str
    owner: int | None
    owner_name: str
    license: str


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What was read. `rows` counts the rows of Posts, `answers` those that have their question, `orphans` the others.

    `dropped` counts what was left out, by reason; `truncated_at` has, for each table that was cut off, the byte after
    its last complete row.
    """

    site: str
    rows: int
    questions: int
    answers: int
    orphans: int
    users: int
    dropped: Mapping[str, int]
    truncated_at: Mapping[str, int]


def read_questions(
    path: Path,
    *,
    site: str | None = None,
    allow_truncated: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Question], ReadReport]:
    """All questions of a dump with their answers, sorted by id, and what was left out.

    `site` is the address in the attribution ("beer.stackexchange.com"); without it the name of the archive or folder is
    taken. `progress(done, total)` is told the bytes of decompressed tables. Raises DumpError where there is no usable
    dump, and TruncatedDumpError for one that is cut off, unless `allow_truncated`.
    """
    posts: dict[int, Post] = {}
    users: dict[int, str] = {}
    dropped: Counter[str] = Counter()
    truncated_at: dict[str, int] = {}
    row_count = 0
    with open_tables(path) as tables:
        site = site or tables.site
        done, total = 0, tables.size(TABLES)

        def count(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done, total)

        for table, stream in tables.streams(TABLES):
            reader = rows(_Counted(stream, count), table=table, allow_truncated=allow_truncated)
            for row in reader:
                if table == "Posts":
                    row_count += 1
                    _take(parse_post(row), posts, dropped)
                elif isinstance(user := parse_user(row), str):
                    dropped[user] += 1
                else:
                    users[user[0]] = user[1]
            if reader.truncated_at is not None:
                truncated_at[table] = reader.truncated_at
    if not any(post.parent is None for post in posts.values()):
        raise DumpError(
            f"{path} has no question in {row_count} rows of Posts; give the dump of a question-and-answer site"
        )
    questions, unjoined = join(posts.values(), users, site)
    answers = sum(len(question.answers) for question in questions)
    orphans = unjoined.get(ORPHAN, 0)
    dropped.update(unjoined)
    report = ReadReport(
        site, row_count, len(questions), answers, orphans, len(users), dict(sorted(dropped.items())), truncated_at
    )
    return questions, report


class _Counted:
    """A stream that tells how many bytes went through it."""

    def __init__(self, stream: ByteStream, count: Callable[[int], None]) -> None:
        self._stream = stream
        self._count = count

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(size)
        self._count(len(piece))
        return piece


def _take(post: Post | str, posts: dict[int, Post], dropped: Counter[str]) -> None:
    if isinstance(post, str):
        dropped[post] += 1
    elif post.id in posts:
        # Which of the two stays must not depend on the order of the rows.
        posts[post.id] = max(posts[post.id], post, key=repr)
        dropped["post: its Id occurs twice"] += 1
    else:
        posts[post.id] = post


def parse_post(row: Mapping[str, str]) -> Post | str:
    """A question or an answer, or the reason why this row is neither. Depends on nothing but the row."""
    kind = row.get("PostTypeId", "")
    if kind not in ("1", "2"):
        return (
            f"post: PostTypeId {kind} is neither question nor answer"
            if _WHOLE.fullmatch(kind)
            else "post: no PostTypeId"
        )
    post_id, votes = _whole(row, "Id"), _whole(row, "Score")
    parent = _whole(row, "ParentId") if kind == "2" else None
    date = _DATE.fullmatch(row.get("CreationDate", ""))
    text = to_markdown(row.get("Body", ""))
    # (what is wrong, the reason to give)
    checks = (
        (post_id is None or post_id < 1, "post: no Id, or not a whole number"),
        (post_id in FABRICATED, "post: fabricated row"),
        (votes is None, "post: no Score, or not a whole number"),
        (kind == "2" and parent is None, "answer: no ParentId, or not a whole number"),
        (date is None, "post: no CreationDate, or not a date"),
        ("Body" not in row, "post: no Body"),
        (not text, "post: empty Body"),
    )
    for wrong, reason in checks:
        if wrong:
            return reason
    assert post_id is not None
    assert votes is not None
    assert date is not None
    day = date[1][:10]
    return Post(
        id=post_id,
        parent=parent,
        accepted_answer=_whole(row, "AcceptedAnswerId") if kind == "1" else None,
        title=row.get("Title", "").strip() if kind == "1" else "",
        tags=tuple(_TAGS.findall(row.get("Tags", ""))) if kind == "1" else (),
        text=text,
        length=plain_length(row["Body"]),
        votes=votes,
        date=f"{date[1]}.{(date[2] or '')[:3]:0<3}",
        owner=_whole(row, "OwnerUserId"),
        owner_name=row.get("OwnerDisplayName", "").strip(),
        license=row.get("ContentLicense", "").strip() or license_of(day),
    )


def parse_user(row: Mapping[str, str]) -> tuple[int, str] | str:
    """(id, display name) of a row of Users, or the reason why there is none."""
    user = _whole(row, "Id")
    if user is None:
        return "user: no Id, or not a whole number"
    name = " ".join(row.get("DisplayName", "").split())
    return (user, name) if name else "user: no DisplayName"


def license_of(day: str) -> str:
    """The licence of what was written on `day` ("2011-04-08"), where the row itself does not name one."""
    if day < "2011-04-08":
        return "CC BY-SA 2.5"
    return "CC BY-SA 3.0" if day <= "2018-05-01" else "CC BY-SA 4.0"


def _whole(row: Mapping[str, str], name: str) -> int | None:
    value = row.get(name, "")
    return int(value) if _WHOLE.fullmatch(value) else None


ORPHAN = "answer: its question is not there"


def join(posts: Iterable[Post], users: Mapping[int, str], site: str) -> tuple[list[Question], dict[str, int]]:
    """Questions with their answers, sorted by id, and how many things found no partner, by reason."""
    questions: dict[int, Post] = {}
    answers: dict[int, list[Post]] = {}
    for post in posts:
        if post.parent is None:
            questions[post.id] = post
        else:
            answers.setdefault(post.parent, []).append(post)
    unjoined: Counter[str] = Counter()
    for parent in answers.keys() - questions.keys():
        unjoined[ORPHAN] += len(answers[parent])
    joined = []
    for post_id in sorted(questions):
        question = questions[post_id]
        mine = sorted(answers.get(post_id, ()), key=lambda answer: answer.id)
        if question.accepted_answer is not None and all(answer.id != question.accepted_answer for answer in mine):
            unjoined["accepted mark: its answer is not there"] += 1
        joined.append(
            Question(
                site=site,
                id=question.id,
                title=question.title,
                text=question.text,
                tags=question.tags,
                votes=question.votes,
                date=question.date,
                attribution=attribute(question, users, site),
                answers=tuple(
                    Answer(
                        id=answer.id,
                        text=answer.text,
                        votes=answer.votes,
                        accepted=answer.id == question.accepted_answer,
                        date=answer.date,
                        attribution=attribute(answer, users, site),
                        length=answer.length,
                    )
                    for answer in mine
                ),
            )
        )
    return joined, dict(unjoined)


def attribute(post: Post, users: Mapping[int, str], site: str) -> Attribution:
    """Address, author, profile and licence of a post.

    The name comes from the table Users, else from the row; a user whose name is in neither is "user" and the number, as
    Stack Exchange itself shows them; nobody at all is "anonymous".
    """
    root = f"https://{quote(site, safe='.-:')}"
    name = users.get(post.owner, "") if post.owner is not None else ""
    if not name:
        name = post.owner_name
    if not name:
        name = "anonymous" if post.owner is None else "Community" if post.owner == COMMUNITY else f"user{post.owner}"
    return Attribution(
        url=f"{root}/{'q' if post.parent is None else 'a'}/{post.id}",
        author=name,
        author_id=post.owner,
        profile_url=None if post.owner is None else f"{root}/users/{post.owner}",
        license=post.license,
    )
