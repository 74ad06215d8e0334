"""The embedded community: a question-and-answer site that nobody has to download, written as a real dump.

No real dump may be shipped, and no real site has a known truth. This one has both: the same facts for every seed
(`synthetic_world.py`), a crowd with the biases of real sites (`synthetic_crowd.py`), and a gold score, for reports only
(`synthetic_gold.py`). It is written in the dump format and read by the same reader as any other.

Left out: comments, edits, badges, links between posts, and questions without any answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from random import Random

from stackllama.data.posts import Attribution, Document, license_of
from stackllama.data.split.assigning import EVAL, assign
from stackllama.data.synthetic import crowd
from stackllama.data.synthetic.gold import gold_score
from stackllama.data.synthetic.world import TOPICS, texts
from stackllama.errors import DataError
from stackllama.files import atomic_folder

__all__ = ["SITE", "gold_score", "world_documents", "write_dump"]

SITE = "embedded"
OPENED = datetime(2015, 1, 5)  # dumps state UTC without saying so
LAST_QUESTION, DUMPED = 3000.0, 3400.0
"""Days after the opening: the last question, and the day of the dump, after which no vote counts."""
DELETED = 25
"""Every so many-th user is deleted."""

_TAGS = tuple(tag for topic in TOPICS for tag in topic.tags)
_FIRST_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Ella", "Finn", "Hugo", "Ines", "Jon", "Kira", "Léo", "Mia", "Nils")
_LAST_NAMES = ("Brook", "Cole", "Dale", "Fields", "Grove", "Hill", "Marsh", "Moss", "Reed", "Thorn", "Vale", "Woods")

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Thread:
    """A question before anybody wrote a word: when it is asked and answered (days), and the ids of its posts."""

    asked_at: float
    days: tuple[float, ...]
    id: int
    answer_ids: tuple[int, ...]


def write_dump(folder: Path, *, questions: int, seed: int, fractions: Mapping[str, float]) -> None:
    """Write Posts.xml, Users.xml, Votes.xml and Tags.xml of a site with `questions` questions into `folder`.

    The same arguments give the same bytes. `seed` moves questions, answers and votes, never a fact. `fractions` are the
    shares of the splits: questions that `splits.assign` puts into the eval split are asked in held-out wordings.
    `folder` appears as a whole or not at all, and replaces what was there. Errors: DataError where there is no question
    to write, or the fractions are no shares; RunError where the disk refuses.
    """
    if questions < 1:
        raise DataError(f"questions is {questions}; the embedded community needs at least 1")
    users = max(20, questions // 4)
    posts: list[Row] = [_tag_wiki(number, tag) for number, tag in enumerate(_TAGS, 1)]
    votes: list[tuple[int, int, int]] = []  # (day, post, type)
    tagged: Counter[str] = Counter()
    for number, thread in enumerate(_threads(questions, seed, first_id=len(_TAGS) + 1)):
        rng = Random(f"{seed} thread {number}")
        held_out = assign(SITE, thread.id, fractions) == EVAL
        rows = _write_thread(rng, thread, votes, users=users, held_out=held_out)
        tagged.update(str(rows[0]["Tags"])[1:-1].split("><"))
        posts.extend(rows)
    posts.sort(key=lambda row: int(str(row["Id"])))
    votes.sort()
    with atomic_folder(folder) as place:
        _write_table(place, "posts", posts)
        _write_table(place, "users", _users(users, seed))
        _write_table(place, "votes", _vote_rows(votes))
        _write_table(
            place,
            "tags",
            ({"Id": n, "TagName": tag, "Count": tagged[tag], "WikiPostId": n} for n, tag in enumerate(_TAGS, 1)),
        )


def world_documents(count: int, seed: int) -> Iterator[Document]:
    """`count` short plain texts about the world, for pretraining a base model; every statement in them is true.

    No text has the form of a question with its answer, nor a wording that is held out for the eval split.
    """
    for number, text in enumerate(texts(count, seed), 1):
        yield Document(
            site=SITE,
            id=number,
            text=text,
            attribution=Attribution(
                url=f"https://{SITE}/documents/{number}",
                author="stackllama",
                author_id=None,
                profile_url=None,
                license="Apache-2.0",
            ),
        )


def _threads(questions: int, seed: int, *, first_id: int) -> list[_Thread]:
    """When everything is written. Ids count up with time over questions and answers alike, as on a real site."""
    rng = Random(f"{seed} calendar")
    asked = sorted(rng.uniform(0, LAST_QUESTION) for _ in range(questions))
    answered = [crowd.answer_days(rng, day, until=DUMPED) for day in asked]
    moments = sorted(
        (day, number, place)
        for number, (first, later) in enumerate(zip(asked, answered, strict=True))
        for place, day in enumerate([first, *later])
    )
    ids = {(number, place): at for at, (_, number, place) in enumerate(moments, first_id)}
    return [
        _Thread(first, tuple(later), ids[number, 0], tuple(ids[number, place] for place in range(1, len(later) + 1)))
        for number, (first, later) in enumerate(zip(asked, answered, strict=True))
    ]


def _write_thread(
    rng: Random, thread: _Thread, votes: list[tuple[int, int, int]], *, users: int, held_out: bool
) -> list[Row]:
    """The rows of a question and its answers; their votes are added to `votes`."""
    asked = crowd.ask(rng, held_out=held_out)
    answers = [crowd.answer(rng, asked, place=place) for place in range(len(thread.days))]
    accepted = crowd.accept(rng, answers)
    ballots = [
        crowd.vote_on_question(rng, thread.asked_at, DUMPED),
        *crowd.vote(rng, thread.asked_at, thread.days, answers, accepted, DUMPED),
    ]
    for post, ballot in zip((thread.id, *thread.answer_ids), ballots, strict=True):
        votes.extend((int(day), post, 2) for day in ballot.up)
        votes.extend((int(day), post, 3) for day in ballot.down)
    scores = [len(ballot.up) - len(ballot.down) for ballot in ballots]
    chosen = {}
    if accepted is not None:
        chosen = {"AcceptedAnswerId": thread.answer_ids[accepted]}
        votes.append((int(thread.days[accepted]), thread.answer_ids[accepted], 1))
    when = _moment(thread.asked_at)
    question: Row = {
        "Id": thread.id,
        "PostTypeId": 1,
        **chosen,
        "CreationDate": when,
        "Score": scores[0],
        "ViewCount": 20 * (1 + sum(len(ballot.up) for ballot in ballots)) + rng.randint(0, 19),
        "Body": asked.body,
        **_owner(rng, users),
        "LastActivityDate": _moment(thread.days[-1]),
        "Title": asked.title,
        "Tags": "".join(f"<{tag}>" for tag in asked.topic.tags[: rng.randint(1, 2)]),
        "AnswerCount": len(answers),
        "CommentCount": 0,
        "ContentLicense": license_of(when[:10]),
    }
    rows = [question]
    for place, one in enumerate(answers):
        when = _moment(thread.days[place])
        rows.append(
            {
                "Id": thread.answer_ids[place],
                "PostTypeId": 2,
                "ParentId": thread.id,
                "CreationDate": when,
                "Score": scores[place + 1],
                "Body": one.body,
                **_owner(rng, users),
                "LastActivityDate": when,
                "CommentCount": 0,
                "ContentLicense": license_of(when[:10]),
            }
        )
    return rows


def _tag_wiki(number: int, tag: str) -> Row:
    return {
        "Id": number,
        "PostTypeId": 5,
        "CreationDate": _moment(0.0),
        "Score": 0,
        "Body": f"<p>Questions about {tag}.</p>\n",
        "OwnerUserId": -1,
        "CommentCount": 0,
        "ContentLicense": license_of(_moment(0.0)[:10]),
    }


def _owner(rng: Random, users: int) -> dict[str, object]:
    """Who wrote a post. Few write much; deleted users leave a name only."""
    user = 1 + int(users * rng.random() ** 2)
    return {"OwnerDisplayName": f"user{user}"} if user % DELETED == 0 else {"OwnerUserId": user}


def _users(users: int, seed: int) -> Iterator[Row]:
    yield {"Id": -1, "Reputation": 1, "CreationDate": _moment(0.0), "DisplayName": "Community"}
    rng = Random(f"{seed} users")
    for user in range(1, users + 1):
        name = f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
        if user % DELETED:
            yield {"Id": user, "Reputation": 1, "CreationDate": _moment(0.0), "DisplayName": name}


def _vote_rows(votes: Iterable[tuple[int, int, int]]) -> Iterator[Row]:
    dates = [_moment(float(day)) for day in range(int(DUMPED) + 1)]  # votes have whole days
    for number, (day, post, kind) in enumerate(votes, 1):
        yield {"Id": number, "PostId": post, "VoteTypeId": kind, "CreationDate": dates[day]}


def _moment(day: float) -> str:
    return (OPENED + timedelta(days=day)).isoformat(timespec="milliseconds")


def _write_table(folder: Path, name: str, rows: Iterable[Row]) -> None:
    """One table as Stack Exchange writes it: a byte order mark, CRLF, one row a line."""
    with (folder / f"{name.capitalize()}.xml").open("w", encoding="utf-8-sig", newline="\r\n") as file:
        file.write(f'<?xml version="1.0" encoding="utf-8"?>\n<{name}>\n')
        for row in rows:
            file.write("  <row " + " ".join(f'{key}="{_escaped(value)}"' for key, value in row.items()) + " />\n")
        file.write(f"</{name}>")


def _escaped(value: object) -> str:
    if isinstance(value, int):
        return str(value)
    return escape(str(value), quote=False).replace('"', "&quot;").replace("\n", "&#xA;")
