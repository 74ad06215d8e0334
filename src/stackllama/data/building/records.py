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

from stackllama.data.building.shuffle import POSTS
from stackllama.data.interchange.rows import merge
from stackllama.data.posts import Answer, Attribution, Pair, Question

NO_QUESTION = "answer: its question was left out"
NO_ANSWER = "pair: an answer of it was left out"
SAME_ANSWERS = "pair: its answers became one"
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


def mended(posts: pa.Table, dropped: Counter[str]) -> pa.Table:
    """The posts after some were left out or changed. Of preference data, answers go with their question, of equal
    answers the first stays, and a stated pair stands between two answers that are there.
    """
    given = pc.is_valid(posts["url"])
    if not pc.any(given).as_py():
        return posts
    rows = posts.filter(given).to_pylist()
    asked = {(row["site"], row["question"]) for row in rows if not row["answers"]}
    first: dict[tuple[str, int, str], int] = {}
    stands_for: dict[tuple[str, int, int], int] = {}
    kept = []
    for row in rows:
        topic = row["site"], row["question"]
        if row["answers"] and topic in asked:
            stands_for[*topic, row["id"]] = first.setdefault((*topic, row["text"]), row["id"])
        if topic not in asked:
            dropped[NO_QUESTION] += 1
        elif row["answers"] and stands_for[*topic, row["id"]] != row["id"]:
            dropped[SAME_TEXT] += 1
        else:
            kept.append(row)
    for row in kept:
        row["accepted_answer"] = stands_for.get((row["site"], row["question"], row["accepted_answer"]))
        row["pairs"] = _standing(row, stands_for, dropped)
    return pa.concat_tables([posts.filter(pc.invert(given)), pa.Table.from_pylist(kept, schema=posts.schema)])


def _standing(row: Mapping[str, Any], stands_for: Mapping[Any, int], dropped: Counter[str]) -> list[int] | None:
    """The sides of the pairs that a question came with and that still stand."""
    if row["pairs"] is None:
        return None
    sides: list[int] = []
    for pair in zip(row["pairs"][::2], row["pairs"][1::2], strict=True):
        better, worse = (stands_for.get((row["site"], row["question"], side)) for side in pair)
        if better is None or worse is None:
            dropped[NO_ANSWER] += 1
        elif better == worse:
            dropped[SAME_ANSWERS] += 1
        else:
            sides += better, worse
    return sides


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
            there = answers.get(answer.id)
            answers[answer.id] = answer if there is None else max(there, answer, key=repr)
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
