"""Questions with their answers as the nested table that the store keeps, and as records.

Texts stay columns. Only what has to be looked at one by one becomes a record: a question with its answers, without the
attributions, to be paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stackllama.data import store
from stackllama.data.joining import Joined
from stackllama.data.posts import Answer, Attribution, Pair, Question

_QUESTIONS = store.SCHEMAS["questions"]
_JUDGED = ("id", "text", "votes", "accepted", "date")
_NOBODY = Attribution("", "", None, None, "")


def nested(joined: Joined, paired: Mapping[int, Question], clusters: Sequence[str]) -> pa.Table:
    """The questions in the schema of the store; `paired` has those with pairs, by their number."""
    questions, answers = joined.questions, joined.answers
    kind = _QUESTIONS.field("answers").type.value_type
    fields = [_attribution(answers) if field.name == "attribution" else _whole(answers[field.name]) for field in kind]
    weights = np.ones(questions.num_rows)
    for at, question in paired.items():
        weights[at] = question.weight
    made = {
        "attribution": _attribution(questions),
        "answers": _lists(joined.starts, pa.StructArray.from_arrays(fields, fields=list(kind)), "answers"),
        "pairs": _pairs(paired, questions.num_rows),
        "weight": pa.array(weights),
        "cluster": pa.array(clusters, pa.string()),
    }
    columns = [made[field.name] if field.name in made else questions[field.name] for field in _QUESTIONS]
    return pa.table(columns, schema=_QUESTIONS)


def to_pair(joined: Joined) -> Iterator[tuple[int, Question]]:
    """The questions with two answers or more, with their numbers; without attributions and the question's own text, and
    with pairs only where they came with them.
    """
    columns = [joined.answers[name].to_pylist() for name in (*_JUDGED, "length")]
    asked = [joined.questions[name].to_pylist() for name in ("site", "id", "votes", "date", "pairs")]
    for at in np.flatnonzero(np.diff(joined.starts) > 1).tolist():
        start, stop = int(joined.starts[at]), int(joined.starts[at + 1])
        answers = tuple(
            Answer(*judged, _NOBODY, length)  # type: ignore[call-arg]  # mypy cannot count what is unpacked
            for *judged, length in zip(*(column[start:stop] for column in columns), strict=True)
        )
        site, number, votes, date, sides = (column[at] for column in asked)
        yield at, Question(site, number, "", "", (), votes, date, _NOBODY, answers, _stated(answers, sides or []))


def _stated(answers: Sequence[Answer], sides: Sequence[int]) -> tuple[Pair, ...]:
    """The pairs that a question came with: the ids of their better and worse answers in turn."""
    place = {answer.id: at for at, answer in enumerate(answers)}
    pairs = ((place[better], place[worse]) for better, worse in zip(sides[::2], sides[1::2], strict=True))
    return tuple(Pair(one, two, max(1, answers[one].votes - answers[two].votes)) for one, two in pairs)


def _attribution(posts: pa.Table) -> pa.StructArray:
    kind = _QUESTIONS.field("attribution").type
    names = [{"author_id": "owner"}.get(field.name, field.name) for field in kind]
    return pa.StructArray.from_arrays([_whole(posts[name]) for name in names], fields=list(kind))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _lists(starts: Any, values: pa.Array, name: str) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values, type=_QUESTIONS.field(name).type)


def _pairs(paired: Mapping[int, Question], count: int) -> pa.ListArray:
    kind = _QUESTIONS.field("pairs").type.value_type
    sizes = np.zeros(count + 1, np.int32)
    for at, question in paired.items():
        sizes[at + 1] = len(question.pairs)
    every = [pair for at in sorted(paired) for pair in paired[at].pairs]
    columns = [pa.array([getattr(pair, field.name) for pair in every], field.type) for field in kind]
    return _lists(np.cumsum(sizes, dtype=np.int32), pa.StructArray.from_arrays(columns, fields=list(kind)), "pairs")
