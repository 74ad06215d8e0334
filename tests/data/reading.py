"""A small dump as records, and their pairs: the way of every build, without a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from stackllama.data.building.gathering import Tell, gather
from stackllama.data.building.joining import ORPHAN, Joined, join_bucket
from stackllama.data.building.keys import join_keys
from stackllama.data.building.workers import open_workers
from stackllama.data.dump.archive import open_tables
from stackllama.data.dump.pieces import Source
from stackllama.data.pairs.nesting import nested
from stackllama.data.pairs.pairing import Answers, Pairs, choose, no_pairs, weigh
from stackllama.data.pairs.rules import PairRules, shown_length
from stackllama.data.pairs.votes import Ballots
from stackllama.data.posts import Pair, Question
from stackllama.data.split.duplicates import Texts
from stackllama.data.store.store import to_questions
from stackllama.errors import DataError


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


def pair_questions(questions: Sequence[Question], rules: PairRules) -> tuple[list[Question], dict[str, int]]:
    """All questions with their pairs (a question without any stays: its answers are good for SFT), and the counts.

    Raises DataError where not a single pair comes out.
    """
    answers = to_columns(questions)
    pairs, counts = choose(answers, rules)
    if not len(pairs):
        raise DataError(no_pairs(len(questions), counts))
    by_question: list[list[Pair]] = [[] for _ in questions]
    for question, better, worse, gap in zip(*(getattr(pairs, f.name).tolist() for f in fields(Pairs)), strict=True):
        by_question[question].append(Pair(better, worse, gap, rules.margin * gap))
    weights = weigh(answers, pairs, rules.weight).tolist()
    found = [
        replace(one, pairs=tuple(mine), weight=weight)
        for one, mine, weight in zip(questions, by_question, weights, strict=True)
    ]
    return found, dict(sorted(counts.items()))


def to_columns(questions: Sequence[Question], ballots: Ballots | None = None) -> Answers:
    """The answers of records; `ballots`, if any, number them the same way."""
    answers = [answer for question in questions for answer in question.answers]
    return Answers(
        keys=[(question.site, question.id) for question in questions],
        starts=np.cumsum([0, *(len(question.answers) for question in questions)]),
        id_A=np.array([answer.id for answer in answers], np.int64),
        votes_A=np.array([answer.votes for answer in answers], np.int64),
        accepted_A=np.array([answer.accepted for answer in answers], bool),
        date_A=[answer.date for answer in answers],
        length_A=np.array([shown_length(answer) for answer in answers], np.int64),
        texts=Texts(pa.array([answer.text for answer in answers], pa.string())),
        ballots=ballots,
    )


def _unpaired(joined: Joined) -> pa.Table:
    count = joined.questions.num_rows
    return nested(joined, Pairs(*[np.zeros(0, np.int64)] * 4), np.ones(count), [""] * count)


def _silent(done: int, total: int) -> None:
    """Nobody is told."""
