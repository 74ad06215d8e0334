"""All questions of one dump as records, for what is small enough for memory: tests, measurements, a look at a dump."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from stackllama.data.archive import open_tables
from stackllama.data.gathering import Tell, gather
from stackllama.data.joining import ORPHAN, Joined, join_bucket
from stackllama.data.keys import join_keys
from stackllama.data.nesting import nested
from stackllama.data.pairing import Pairs
from stackllama.data.pieces import Source
from stackllama.data.posts import Question
from stackllama.data.store import to_questions
from stackllama.data.workers import open_workers


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
    path: Path, *, site: str | None = None, allow_truncated: bool = False, tell: Tell | None = None
) -> tuple[list[Question], ReadReport]:
    """All questions of a dump with their answers, sorted by id and without pairs, and what was left out.

    `site` is the address in the attribution ("beer.stackexchange.com"); without it the name of the archive or folder is
    taken. Goes the way of every build, in one process and a temporary folder. Raises DumpError where there is no usable
    dump, and TruncatedDumpError for one that is cut off, unless `allow_truncated`.
    """
    with open_tables(path) as tables:
        source = Source(0, str(path), site or tables.site)
    with TemporaryDirectory() as folder, open_workers("local", 1) as over:
        gathered = gather([source], Path(folder), over, allow_truncated=allow_truncated, tell=tell or _silent)
        join_keys(Path(folder), threads=1)
        buckets = [join_bucket(Path(folder), gathered.posts, n) for n in range(gathered.buckets)]
    questions = [question for joined in buckets for question in to_questions(_unpaired(joined).to_pylist())]
    dropped = sum((joined.dropped + joined.notes for joined in buckets), gathered.dropped)
    answers = sum(joined.answers.num_rows for joined in buckets)
    report = ReadReport(
        source.site,
        gathered.rows,
        len(questions),
        answers,
        dropped[ORPHAN],
        gathered.users,
        dict(sorted(dropped.items())),
        gathered.truncated.get(str(path), {}),
    )
    return sorted(questions, key=lambda question: question.id), report


def _unpaired(joined: Joined) -> pa.Table:
    count = joined.questions.num_rows
    return nested(joined, Pairs(*[np.zeros(0, np.int64)] * 4), np.ones(count), [""] * count)


def _silent(done: int, total: int) -> None:
    """Nobody is told."""
