"""Questions that ask the same, as clusters that fall into one split: near-copies of a text, and linked questions.

Only members of clusters of several questions are held in memory, and what the search for near-copies needs of one band.
What is decided goes to a file sorted by bucket, as every join does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stackllama.data.duplicates import BANDS, BINS, Signatures, similar_pairs
from stackllama.data.joining import CLUSTERS, LINKS
from stackllama.data.ledger import read_ledger
from stackllama.data.shuffle import bucket_of
from stackllama.data.splits import EVAL, Key, decide
from stackllama.errors import DataError

LINK_KINDS = {"off": (), "duplicates": (3,), "all": (1, 3)}
"""What PostLinks says of two questions: 3, one is a duplicate of the other; 1, one mentions the other."""

MEMBERS = pa.schema(
    {"bucket": pa.int32(), "site": pa.string(), "id": pa.int64(), "cluster": pa.string(), "split": pa.string()}
)


@dataclass(frozen=True, slots=True)
class Clustering:
    """What makes two questions one cluster: near-copies of a text, and links ("off", "duplicates" or "all")."""

    near_copies: bool = True
    links: str = "duplicates"


class Union:
    """Which keys belong together?"""

    def __init__(self) -> None:
        self._above: dict[Key, Key] = {}

    def join(self, one: Key, other: Key) -> None:
        """Put two keys, and all that belong to either, together."""
        first, second = sorted((self._top(one), self._top(other)))
        self._above[second] = first

    def _top(self, key: Key) -> Key:
        above = self._above.setdefault(key, key)
        while above != key:
            self._above[key] = above = self._above[above]  # halves the way for the next one
            key, above = above, self._above[above]
        return key

    def clusters(self) -> list[list[Key]]:
        """All keys that were joined, sorted, in sorted clusters."""
        found: dict[Key, list[Key]] = {}
        for key in sorted(self._above):
            found.setdefault(self._top(key), []).append(key)
        return list(found.values())


def write_clusters(
    folder: Path,
    sites: Mapping[int, str],
    clustering: Clustering,
    *,
    ledger: Path,
    fractions: Mapping[str, float],
    buckets: int,
) -> dict[str, int]:
    """Find the clusters among what the pieces in `folder` left, decide their splits, and write both for the buckets.

    `sites` has the site of each source. Gives counts for the report. Raises DataError where the ledger is none.
    """
    union, here = Union(), set[Key]()
    by_text = _join_texts(union, here, folder) if clustering.near_copies else 0
    by_link = _join_links(union, here, folder, sites, LINK_KINDS[clustering.links])
    every = union.clusters()
    past = _past(ledger, [key for members in every for key in members])
    clusters = [known for members in every if len(known := [key for key in members if key in here or key in past]) > 1]
    decided = decide(clusters, past, fractions=fractions)
    _write(folder / CLUSTERS, clusters, decided, buckets)
    return {
        "clusters": len(clusters),
        "questions in them": sum(map(len, clusters)),
        "largest": max(map(len, clusters), default=0),
        "pairs by text": by_text,
        "pairs by link": by_link,
        "clusters in eval": sum(any(decided[key] == EVAL for key in members) for members in clusters),
        "questions that stay out for their past": sum(split is None for split in decided.values()),
    }


class _Stacked:
    """The arrays of all pieces, one below the other, on disk."""

    def __init__(self, folder: Path) -> None:
        names = sorted(path.name.removesuffix(".signatures.npy") for path in folder.glob("*.signatures.npy"))
        self._signatures = [np.load(folder / f"{name}.signatures.npy", mmap_mode="r") for name in names]
        self._bands = [np.load(folder / f"{name}.bands.npy", mmap_mode="r") for name in names]
        self._asked = [pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.asked"))).read_all() for name in names]
        self._ends = np.cumsum([0, *(len(one) for one in self._signatures)])

    def band(self, number: int) -> NDArray[np.uint64]:
        """The keys (N,) of all texts in a band."""
        return np.concatenate([np.zeros(0, np.uint64), *(one[number] for one in self._bands)])

    def __getitem__(self, number_N: NDArray[np.int64]) -> Signatures:
        """The signatures (N, K) of some texts."""
        found = np.empty((len(number_N), BINS), np.uint32)
        piece_N = np.searchsorted(self._ends, number_N, side="right") - 1
        for piece in np.unique(piece_N):
            mine = piece_N == piece
            found[mine] = self._signatures[piece][number_N[mine] - self._ends[piece]]
        return found

    def key(self, number: int) -> Key:
        """Site and id of a text."""
        piece = int(np.searchsorted(self._ends, number, side="right")) - 1
        row = number - int(self._ends[piece])
        return self._asked[piece]["site"][row].as_py(), self._asked[piece]["id"][row].as_py()


def _join_texts(union: Union, here: set[Key], folder: Path) -> int:
    """Join near-copies; gives how many pairs of different questions were found."""
    texts = _Stacked(folder)
    found = set[tuple[Key, Key]]()
    seen = set[tuple[int, int]]()
    for earlier_P, later_P in similar_pairs(map(texts.band, range(BANDS)), texts):
        for pair in set(zip(earlier_P.tolist(), later_P.tolist(), strict=True)) - seen:
            seen.add(pair)
            one, other = texts.key(pair[0]), texts.key(pair[1])
            here |= {one, other}
            if one != other:
                union.join(one, other)
                found.add((min(one, other), max(one, other)))
    return len(found)


def _join_links(union: Union, here: set[Key], folder: Path, sites: Mapping[int, str], kinds: Sequence[int]) -> int:
    """Join linked questions, of which at least one is in the dumps; gives how many links were followed."""
    links = pq.read_table(folder / LINKS)
    rows = links.filter(pc.is_in(links["kind"], pa.array(kinds, pa.int32()))).to_pylist()
    for row in rows:
        site = sites[row["source"]]
        ends = (site, row["id"]), (site, row["related"])
        here |= {key for key, there in zip(ends, (row["id_here"], row["related_here"]), strict=True) if there}
        union.join(*ends)
    return len(rows)


def _past(ledger: Path, keys: Sequence[Key]) -> dict[Key, str]:
    """What the ledger knows of some keys."""
    wanted: dict[str, list[int]] = {}
    for site, number in keys:
        wanted.setdefault(site, []).append(number)
    past: dict[Key, str] = {}
    for lot in read_ledger(ledger) if keys else ():
        for site, ids in wanted.items():
            mine = lot.filter(pc.and_(pc.equal(lot["site"], site), pc.is_in(lot["id"], pa.array(ids))))
            past |= {(site, row["id"]): row["split"] for row in mine.to_pylist()}
    return past


def _write(path: Path, clusters: Iterable[Sequence[Key]], decided: Mapping[Key, str | None], buckets: int) -> None:
    rows = [
        {
            "bucket": int(bucket_of(site, np.array([number]), buckets)[0]),
            "site": site,
            "id": number,
            "cluster": f"{members[0][0]}/{members[0][1]}",
            "split": decided[site, number] or "",
        }
        for members in clusters
        for site, number in members
    ]
    rows.sort(key=lambda row: (row["bucket"], row["site"], row["id"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=MEMBERS), path, row_group_size=1 << 15)


def check_clusters(folder: Path, shards: Mapping[str, Sequence[str]]) -> None:
    """Make sure that no cluster is in two splits: over what the shards in `folder` say, not over what was decided.

    `shards` has the files of each split. Raises DataError naming clusters that are.
    """
    config: dict[str, str | bool | int | float | list[str]]
    config = {"memory_limit": "384MB", "temp_directory": str(folder / "work"), "threads": 1}
    with duckdb.connect(config=config) as database:
        said = [
            database.read_parquet([str(folder / file) for file in files]).project(f"cluster, '{split}' as split")
            for split, files in shards.items()
            if files
        ]
        every = reduce(lambda one, other: one.union(other), said)
        splits = every.aggregate("cluster, count(distinct split) as splits", "cluster")
        torn = splits.filter("splits > 1").order("cluster").limit(5).fetchall()
    if torn:
        names = ", ".join(cluster for cluster, _ in torn)
        raise DataError(
            f"the clusters of {names} are in two splits, so held-out questions could be trained on; this must not "
            "happen: keep the folder and report it"
        )
