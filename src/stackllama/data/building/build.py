"""From dumps to the store: gather the posts, pair and split the questions of each bucket, write; and the counts.

    dumps -> pieces -> (convert) -> posts in buckets -> (join, pair, split) -> shards -> manifest

What is in brackets runs in parallel. Everything on the way lies in a folder of work, and a build that was stopped goes
on with the pieces and buckets that are done. The same dumps and settings give the same shards, whatever the number of
processes.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from stackllama.data.building.bucket import Bucketing, Finished, finish
from stackllama.data.building.gathering import Gathered, Tell, gather, prepare
from stackllama.data.building.keys import join_keys
from stackllama.data.building.shuffle import bucket_of, write_dealt
from stackllama.data.building.workers import Over, open_workers
from stackllama.data.dump.archive import open_tables
from stackllama.data.dump.pieces import Source
from stackllama.data.interchange import reading as interchange_read
from stackllama.data.interchange.rows import Frame
from stackllama.data.pairs import baselines
from stackllama.data.pairs.pairing import BY_ALL, BY_DATED, CROWDED, no_pairs
from stackllama.data.pairs.rules import KEPT, PairRules
from stackllama.data.posts import Document
from stackllama.data.split.assigning import SPLITS, assign
from stackllama.data.split.clusters import Clustering, check_clusters, write_clusters
from stackllama.data.split.ledger import locked_ledger, open_ledger, read_ledger, save_ledger
from stackllama.data.store import store
from stackllama.data.text.cleaning import DROP, Cleaning
from stackllama.data.text.language import own_languages
from stackllama.errors import DataError
from stackllama.files import digest_file

Counts = dict[str, Any]
Show = Callable[[str, str], AbstractContextManager[Tell]]
"""Opens a progress display of a title and a unit."""


@contextmanager
def silent(_title: str, _unit: str) -> Iterator[Tell]:
    """Shows nothing."""
    yield lambda _done, _total: None


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the outcome of a build, beside the dumps."""

    fractions: Mapping[str, float]
    rules: PairRules
    clustering: Clustering = field(default_factory=Clustering)
    cleaning: Cleaning = field(default_factory=Cleaning)
    allow_truncated: bool = False
    frame: Frame = ("", "")


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how fast a build is, and nothing else: an engine, "local" or "ray", and a number of processes."""

    workers: int = 1
    engine: str = "local"


def sources(places: Sequence[str | Path], site: str | None = None) -> list[Source]:
    """The dumps and preference data at `places`, numbered; `site` is the address of all dumps, else the name of each
    archive or folder is. Raises DumpError where a dump cannot be opened.
    """
    found = []
    for number, place in enumerate(map(str, places)):
        if interchange_read.is_records(place):
            found.append(Source(number, place, ""))
        else:
            with open_tables(Path(place)) as tables:
                found.append(Source(number, place, site or tables.site))
    return found


def build(
    dumps: Sequence[Source],
    folder: Path,
    settings: Settings,
    machine: Machine,
    *,
    ledger: Path,
    fingerprint: object,
    show: Show = silent,
) -> Counts:
    """Build the store in `folder` out of the sources, and give the counts.

    `ledger` is the file that remembers the split of every question; it is made where it is missing. `fingerprint`
    stands for the content of the sources: with another one, other settings or another ledger, nothing that an earlier
    build left is gone on with. Raises DumpError where a dump cannot be used, DataError where no pair comes out,
    RunError where the disk refuses or another build has the ledger.
    """
    folder, ledger = folder.absolute(), ledger.absolute()  # workers may stand elsewhere
    work = folder / "work"
    open_ledger(ledger)  # one that cannot be used is told before hours of work
    with locked_ledger(ledger):
        past = digest_file(ledger) if ledger.exists() else None
        given = {"sources": [(one.path, one.site) for one in dumps], "content": fingerprint, "ledger": past}
        prepare(work, {**given, "settings": repr(settings)})
        with open_workers(machine.engine, machine.workers) as over:
            with show("data: converting", "bytes") as tell:
                gathered = gather(
                    dumps,
                    work,
                    over,
                    allow_truncated=settings.allow_truncated,
                    frame=settings.frame,
                    near_copies=settings.clustering.near_copies,
                    cleaning=settings.cleaning,
                    tell=tell,
                )
            with show("data: joining", "steps") as tell:
                clusters = _join(gathered, work, settings, machine, tell, ledger)
            with show("data: writing", "buckets") as tell:
                finished = _finish(gathered, folder, settings, over, tell, ledger)
        counts = _commit(folder, gathered, finished, settings)
        save_ledger(ledger, sorted(work.glob("bucket-*.ledger")), folder=work)
        shutil.rmtree(work)
        return counts | {"clusters": clusters}


def _join(
    gathered: Gathered, work: Path, settings: Settings, machine: Machine, tell: Tell, ledger: Path
) -> dict[str, int]:
    """What goes over a whole dump and not bucket by bucket: names, dated votes, doubles, clusters. Gives counts."""
    join_keys(work, threads=machine.workers)
    tell(1, 2)
    sites = {source.number: source.site for source in gathered.sources}
    counts = write_clusters(
        work, sites, settings.clustering, ledger=ledger, fractions=settings.fractions, buckets=gathered.buckets
    )
    tell(2, 2)
    pa.default_memory_pool().release_unused()  # or Arrow keeps what the joins took beside the buckets
    return counts


def _finish(
    gathered: Gathered, folder: Path, settings: Settings, over: Over, tell: Tell, ledger: Path
) -> list[Finished]:
    """Every bucket finished, in order."""
    bucketing = Bucketing(
        folder / "work",
        folder,
        tuple(gathered.posts),
        settings.fractions,
        settings.rules,
        gathered.questions,
        _deal_past(ledger, folder / "work", gathered.buckets),
        own_languages(gathered.languages) if settings.cleaning.language == DROP else None,
    )
    found: dict[int, Finished] = {}
    for bucket, finished in over(range(gathered.buckets), partial(finish, bucketing)):
        found[bucket] = finished
        tell(len(found), gathered.buckets)
    return [found[bucket] for bucket in sorted(found)]


def _deal_past(ledger: Path, work: Path, buckets: int) -> tuple[Path, ...]:
    """What the ledger knows, dealt to the buckets."""
    files = []
    for number, lot in enumerate(read_ledger(ledger)):
        bucket_N = bucket_of(lot["site"], lot["id"].to_numpy(), buckets)
        files.append(work / f"past-{number:06}")
        write_dealt(files[-1], lot, bucket_N)
    return tuple(files)


def _commit(folder: Path, gathered: Gathered, finished: Sequence[Finished], settings: Settings) -> Counts:
    """Check that the numbers add up, name the shards in the manifest, and give the counts."""
    reasons, pairs = gathered.dropped.copy(), Counter[str]()
    for one in finished:
        reasons.update(one.dropped)
        reasons.update(one.notes)
        pairs.update(one.pairs)
    dropped = {reason: count for reason, count in reasons.items() if reason.startswith(_OF_POSTS)}
    notes = {reason: count for reason, count in reasons.items() if reason not in dropped}
    there = set(wanted(settings.fractions)).union(*(one.parts for one in finished))  # the ledger may know others
    parts = {f"questions/{split}": _part(split, finished) for split in SPLITS if split in there}
    totals = Counter[str]()
    for part in parts.values():
        totals.update(part.counts)
    kept = pairs.pop(KEPT, 0)
    notes |= {what: pairs.pop(what) for what in (BY_ALL, BY_DATED, CROWDED) if what in pairs}
    if kept != totals["pairs"] or gathered.rows != totals["questions"] + totals["answers"] + sum(dropped.values()):
        raise AssertionError(f"counts do not add up: {gathered.rows} rows, {dict(totals)}, {dropped}, {kept} pairs")
    if not kept:
        raise DataError(no_pairs(totals["questions"], pairs))
    check_clusters(folder, {key.split("/")[1]: [one.file for one in part.shards] for key, part in parts.items()})
    store.commit(folder, parts)
    return {
        "rows": gathered.rows,
        "users": gathered.users,
        "dropped": dict(sorted(dropped.items())),
        "pairs_dropped": dict(sorted(pairs.items())),
        "notes": dict(sorted(notes.items())),
        "truncated": gathered.truncated,
        "languages": gathered.languages,
        "baselines": baselines.add(one.baselines for one in finished),
    }


_OF_POSTS = ("post: ", "question: ", "answer: ")
"""How the reasons begin for which a row of Posts is dropped."""


def _part(split: str, finished: Sequence[Finished]) -> store.Part:
    """All shards of a split, and what they hold together."""
    there = [one.parts[split] for one in finished if split in one.parts]
    counts = {what: sum(part["counts"][what] for part in there) for what in ("questions", "answers", "pairs")}
    return store.Part(counts, tuple(store.Shard(**part["shard"]) for part in there))


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
