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
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stackllama.data.building.joining import CLUSTERS, VOTES, Joined, join_bucket, read_joined
from stackllama.data.building.shuffle import read_dealt
from stackllama.data.pairs.baselines import Sums, tally
from stackllama.data.pairs.nesting import nested, stated_pairs, to_answers
from stackllama.data.pairs.pairing import Pairs, choose, merged, weigh
from stackllama.data.pairs.rules import KEPT, PairRules
from stackllama.data.split.assigning import LEDGER, SPLITS, assigner
from stackllama.data.store import store
from stackllama.files import atomic_write_json, raise_if_full

OTHER_SPLIT = "question: its cluster belongs to another split"
ANSWER_OTHER_SPLIT = "answer: the cluster of its question belongs to another split"
PAIR_OTHER_SPLIT = "pair: the cluster of its question belongs to another split"


@dataclass(frozen=True, slots=True)
class Bucketing:
    """What decides the outcome of a bucket, beside its number.

    `work` has what the pieces left; the shards go to `store`. `pieces` are the files of posts, each with the number
    of its source; `questions` is how many all buckets hold; `past` are the files of what the ledger knew; `own` has the
    languages that the posts of each site may be in, None where nobody asks.
    """

    work: Path
    store: Path
    pieces: tuple[tuple[Path, int], ...]
    fractions: Mapping[str, float]
    rules: PairRules
    questions: int
    past: tuple[Path, ...] = ()
    own: Mapping[str, frozenset[str]] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of a bucket. `parts` has for each split its counts and its shard; `dropped` counts posts, `pairs` pairs
    and `notes` other things, by reason; `baselines` has the sums of `baselines.tally`.
    """

    parts: Mapping[str, Mapping[str, Any]]
    dropped: Mapping[str, int]
    pairs: Mapping[str, int]
    notes: Mapping[str, int]
    baselines: Mapping[str, Sums]


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
    joined = join_bucket(bucketing.work, bucketing.pieces, bucket, bucketing.own)
    pairs: Counter[str] = Counter()
    splits, clusters = _splits(bucketing, bucket, joined.questions)
    chosen, weight_Q, sums = _paired(joined, bucketing, bucket, pairs)
    table = nested(joined, chosen, weight_Q, clusters, margin=bucketing.rules.margin)
    assigned = np.array([split or "" for split in splits], dtype=str)
    out = table.filter(pa.array(assigned == ""))
    if out.num_rows:
        lost = store.count_questions(out)
        joined.dropped[OTHER_SPLIT] += lost["questions"]
        joined.dropped[ANSWER_OTHER_SPLIT] += lost["answers"]
        pairs[PAIR_OTHER_SPLIT] += lost["pairs"]
        pairs[KEPT] -= lost["pairs"]
    parts = _parts(bucketing, bucket, table, assigned)
    return Finished(parts, dict(joined.dropped), dict(pairs), dict(joined.notes), sums)


def _paired(
    joined: Joined, bucketing: Bucketing, bucket: int, counts: Counter[str]
) -> tuple[Pairs, NDArray[np.float64], dict[str, Sums]]:
    """The pairs of all questions, their weights, and what other rules would have done. Those that came with pairs keep
    them.
    """
    rules = bucketing.rules
    answers = to_answers(joined, None if rules.time == "off" else read_joined(bucketing.work, VOTES, bucket))
    stated = stated_pairs(joined)
    chosen, reasons = choose(answers, rules, pc.is_null(joined.questions["pairs"]).to_numpy())
    counts.update(reasons)
    counts[KEPT] += len(stated)
    pairs = merged(chosen, stated)
    sums = tally(answers, stated, rules, bucketing.questions)
    return pairs, weigh(answers, pairs, rules.weight), sums


def _splits(bucketing: Bucketing, bucket: int, questions: pa.Table) -> tuple[list[str | None], list[str]]:
    """The split of each question, None for one that may be used nowhere; and the name of its cluster."""
    members = {
        (row["site"], row["id"]): (row["split"] or None, row["cluster"])
        for row in read_joined(bucketing.work, CLUSTERS, bucket).to_pylist()
    }
    lots = (lot.to_pylist() for lot in read_dealt(bucketing.past, bucket, LEDGER))
    past = {(row["site"], row["id"]): row["split"] for lot in lots for row in lot}
    assign = assigner(bucketing.fractions)
    splits: list[str | None] = []
    clusters = []
    for site, number in zip(questions["site"].to_pylist(), questions["id"].to_pylist(), strict=True):
        split, cluster = members.get((site, number), (None, ""))
        if not cluster:
            split, cluster = past.get((site, number)) or assign(site, number), f"{site}/{number}"
        splits.append(split)
        clusters.append(cluster)
    return splits, clusters


def _parts(bucketing: Bucketing, bucket: int, table: pa.Table, assigned: NDArray[np.str_]) -> dict[str, Any]:
    """Write the shard of each split that has questions, and what the ledger is to remember."""
    parts = {}
    for split in SPLITS:
        chosen = table.filter(pa.array(assigned == split))
        if chosen.num_rows:
            shard = store.write_shard(bucketing.store, "questions", split, bucket, chosen)
            parts[split] = {"counts": store.count_questions(chosen), "shard": asdict(shard)}
    remembered = table.select(["site", "id"]).append_column("split", pa.array(assigned, pa.string()))
    remembered = remembered.filter(pa.array(assigned != ""))
    pq.write_table(remembered.cast(LEDGER), bucketing.work / f"bucket-{bucket:06}.ledger")
    return parts
