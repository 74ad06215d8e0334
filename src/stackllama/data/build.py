"""From what was read to the store: each question once, with its pairs, in its split; and the counts of the data stage.

The counts are the content of `data/report.json`: rows, orphans, cut-off tables, and what was dropped, by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stackllama.data import store
from stackllama.data.posts import Document, Question, ReadReport
from stackllama.data.preferences import KEPT, pair_questions
from stackllama.data.splits import Ledger, assign

Counts = dict[str, Any]


def gather(reads: Iterable[tuple[list[Question], ReadReport]]) -> tuple[list[Question], Counts]:
    """All questions of several dumps, sorted by site and id, each once (the first read stays), and the counts."""
    found: dict[tuple[str, int], Question] = {}
    dropped: Counter[str] = Counter()
    counts: Counts = {"rows": 0, "orphans": 0, "truncated": {}}
    for questions, report in reads:
        counts["rows"] += report.rows
        counts["orphans"] += report.orphans
        dropped.update(report.dropped)
        if report.truncated_at:
            counts["truncated"][report.site] = dict(report.truncated_at)
        for question in questions:
            if found.setdefault((question.site, question.id), question) is not question:
                dropped["question: its site and Id were read before"] += 1
    return [found[key] for key in sorted(found)], counts | {"dropped": dict(dropped)}


def write_splits(
    folder: Path, questions: Iterable[Question], *, fractions: Mapping[str, float], max_pairs: int, ledger: Path
) -> dict[str, int]:
    """Pair the questions, assign each to its split, write the store in `folder`; gives what was kept or dropped, by
    reason.

    `ledger` is the file that remembers assignments; it is made where it is missing. A split may stay empty: the
    stage that needs it says so. Raises DataError for a dump without a usable pair, RunError where the disk refuses;
    a ledger that cannot be read or written is told before anything of the store is written.
    """
    past = Ledger.open(ledger)
    paired, counts = pair_questions(questions, max_pairs=max_pairs)
    assignment = past.assign([(one.site, one.id) for one in paired], fractions=fractions)
    for split in wanted(fractions):
        store.write_questions(
            folder, split, [one for one in paired if assignment.splits.get((one.site, one.id)) == split]
        )
    past.save(ledger)
    dropped = counts | {"question: its cluster belongs to another split": len(assignment.dropped)}
    return {reason: count for reason, count in dropped.items() if count and reason != KEPT}


def write_documents(folder: Path, documents: Iterable[Document], *, fractions: Mapping[str, float]) -> None:
    """Assign plain documents to their splits by a hash of their ids, and write the store."""
    by_split: dict[str, list[Document]] = {split: [] for split in wanted(fractions)}
    for document in documents:
        by_split[assign(document.site, document.id, fractions)].append(document)
    for split, chosen in by_split.items():
        store.write_documents(folder, split, chosen)


def wanted(fractions: Mapping[str, float]) -> list[str]:
    """The splits that get a share."""
    return [split for split, share in fractions.items() if share > 0]
