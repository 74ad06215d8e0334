"""Preference data of other tools among the posts of dumps: questions as rows, and parts of a question put together.

Such a question brings its addresses, names and perhaps its pairs with it, so nothing is looked up for it; its parts may
come out of different pieces, and meet in their bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stackllama.data.interchange_rows import merge
from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.data.shuffle import POSTS

FURTHER_PART = "question: a further part of it"
SAME_TEXT = "answer: its text was there before"


def to_rows(questions: Iterable[Question]) -> pa.Table:
    """Questions and their answers in the schema `shuffle.POSTS`."""
    return pa.Table.from_pylist([row for question in questions for row in _rows(question)], schema=POSTS)


def merge_parts(posts: pa.Table, dropped: Counter[str]) -> pa.Table:
    """The posts, with the rows of preference data (they have an address) united by question."""
    given = pc.is_valid(posts["url"])
    rows = posts.filter(given).to_pylist()
    if not rows:
        return posts
    parts: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["site"], row["question"]), []).append(row)
    merged = [merge(_parts(some)) for some in parts.values()]
    asked = sum(not row["answers"] for row in rows)
    dropped[FURTHER_PART] += asked - len(merged)
    dropped[SAME_TEXT] += len(rows) - asked - sum(len(question.answers) for question in merged)
    return pa.concat_tables([posts.filter(pc.invert(given)), to_rows(merged)])


def _rows(question: Question) -> list[dict[str, Any]]:
    sides = [question.answers[at].id for pair in question.pairs for at in (pair.better, pair.worse)]
    accepted = next((answer.id for answer in question.answers if answer.accepted), None)
    asked = {"title": question.title, "tags": list(question.tags), "accepted_answer": accepted, "pairs": sides or None}
    posts: list[Question | Answer] = [question, *question.answers]
    return [
        {
            "site": question.site,
            "id": post.id,
            "question": question.id,
            "answers": post is not question,
            "text": post.text,
            "length": post.length if isinstance(post, Answer) else None,
            "votes": post.votes,
            "date": post.date,
            "owner": post.attribution.author_id,
            "owner_name": post.attribution.author,
            "license": post.attribution.license,
            "url": post.attribution.url,
            "profile_url": post.attribution.profile_url,
            **(asked if post is question else {"title": "", "tags": []}),
        }
        for post in posts
    ]


def _parts(rows: list[dict[str, Any]]) -> list[Question]:
    """The parts of one question, each with the pairs that it states and the answers of all."""
    accepted = {row["accepted_answer"] for row in rows if not row["answers"]}
    answers: dict[int, Answer] = {}
    for row in rows:
        if row["answers"]:
            answer = Answer(accepted=row["id"] in accepted, length=row["length"], **_shared(row))
            answers[answer.id] = max(answers.get(answer.id, answer), answer, key=repr)
    place = {number: at for at, number in enumerate(answers)}
    return [
        Question(
            site=row["site"],
            title=row["title"],
            tags=tuple(row["tags"]),
            answers=tuple(answers.values()),
            pairs=tuple(_stated(row["pairs"] or [], place)),
            **_shared(row),
        )
        for row in rows
        if not row["answers"]
    ]


def _shared(row: Mapping[str, Any]) -> dict[str, Any]:
    by = Attribution(row["url"], row["owner_name"], row["owner"], row["profile_url"], row["license"])
    return {name: row[name] for name in ("id", "text", "votes", "date")} | {"attribution": by}


def _stated(sides: list[int], place: Mapping[int, int]) -> Iterable[Pair]:
    for better, worse in zip(sides[::2], sides[1::2], strict=True):
        yield Pair(place[better], place[worse], 1)
