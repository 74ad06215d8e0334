"""One bucket of questions, from its posts to the shards of its splits.

A function of the bucket and of what was joined before, so that buckets are worked on in any order, by any number of
processes, and a build that was stopped keeps those that are done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stackllama.data import store
from stackllama.data.joining import Joined, join_bucket
from stackllama.data.nesting import nested, to_pair
from stackllama.data.posts import Question
from stackllama.data.preferences import KEPT, with_pairs
from stackllama.data.splits import assign
from stackllama.files import atomic_write_json, raise_if_full


@dataclass(frozen=True, slots=True)
class Bucketing:
    """What decides the outcome of a bucket, beside its number.

    `work` has what the pieces left; the shards go to `store`. `pieces` are the files of posts, each with the number
    of its source.
    """

    work: Path
    store: Path
    pieces: tuple[tuple[Path, int], ...]
    fractions: Mapping[str, float]
    max_pairs: int


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of a bucket. `parts` has for each split its counts and its shard; `dropped` counts posts, `pairs` pairs
    and `notes` other things, by reason.
    """

    parts: Mapping[str, Mapping[str, Any]]
    dropped: Mapping[str, int]
    pairs: Mapping[str, int]
    notes: Mapping[str, int]


def finish(bucketing: Bucketing, bucket: int) -> Finished:
    """Join, pair and split the questions of a bucket, and write their shards, unless that was done before.

    Raises RunError where the disk is full.
    """
    path = bucketing.work / f"bucket-{bucket:06}.json"
    if (done := _read_finished(path)) is not None:
        return done
    try:
        finished = _finish(bucketing, bucket)
    except OSError as error:
        raise_if_full(error, path)
        raise
    atomic_write_json(path, asdict(finished))
    return finished


def _read_finished(path: Path) -> Finished | None:
    try:
        return Finished(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _finish(bucketing: Bucketing, bucket: int) -> Finished:
    joined = join_bucket(bucketing.work, bucketing.pieces, bucket)
    counts: Counter[str] = Counter()
    table = nested(joined, _paired(joined, bucketing, counts), [""] * joined.questions.num_rows)
    return Finished(_parts(bucketing, bucket, table), dict(joined.dropped), dict(counts), dict(joined.notes))


def _paired(joined: Joined, bucketing: Bucketing, counts: Counter[str]) -> dict[int, Question]:
    """The questions that can have pairs with those that they get, by their number."""
    found = {}
    for at, question in to_pair(joined):
        if question.pairs:
            found[at], reasons = question, {KEPT: len(question.pairs)}
        else:
            found[at], reasons = with_pairs(question, max_pairs=bucketing.max_pairs)
        counts.update(reasons)
    return found


def _parts(bucketing: Bucketing, bucket: int, table: pa.Table) -> dict[str, Any]:
    """Write the shard of each split that has questions."""
    keys = zip(table["site"].to_pylist(), table["id"].to_pylist(), strict=True)
    split_Q = np.array([assign(site, number, bucketing.fractions) for site, number in keys], dtype=str)
    parts = {}
    for split in bucketing.fractions:
        chosen = table.filter(pa.array(split_Q == split))
        if chosen.num_rows:
            shard = store.write_shard(bucketing.store, "questions", split, bucket, chosen)
            parts[split] = {"counts": store.count_questions(chosen), "shard": asdict(shard)}
    return parts
