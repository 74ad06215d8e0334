"""Questions that ask the same, as clusters that fall into one split: near-copies of a text, and linked questions.

Everything is an array: some 50 bytes a question, and for the search what one band needs. What is decided goes to a file
sorted by bucket, as every join does.

Legend: N questions, numbered by site and id; E edges between them; M members of clusters of several questions.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from stackllama.data.building.joining import CLUSTERS, LINKS
from stackllama.data.building.shuffle import bucket_of
from stackllama.data.split.assigning import EVAL, NOWHERE, SPLITS, decide
from stackllama.data.split.duplicates import BANDS, BINS, Signatures, similar_pairs
from stackllama.data.split.ledger import read_ledger
from stackllama.errors import DataError

LINK_KINDS = {"off": (), "duplicates": (3,), "all": (1, 3)}
"""What PostLinks says of two questions: 3, one is a duplicate of the other; 1, one mentions the other."""

MEMBERS = pa.schema(
    {"bucket": pa.int32(), "site": pa.string(), "id": pa.int64(), "cluster": pa.string(), "split": pa.string()}
)

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Clustering:
    """What makes two questions one cluster: near-copies of a text, and links ("off", "duplicates" or "all")."""

    near_copies: bool = True
    links: str = "duplicates"


class Keys:
    """Site and id of every question that may belong to a cluster, sorted and each once.

    `sites` are the names, sorted; `site_N` and `id_N` say whose a number is, and `here_N` whether it is in the dumps (a
    link may lead to a question that is not).
    """

    def __init__(self, sites: Sequence[str], site_N: Numbers, id_N: Numbers, here_N: NDArray[np.bool_]) -> None:
        self.sites = tuple(sorted(set(sites)))
        self._ranks = {site: rank for rank, site in enumerate(self.sites)}
        rank_S = np.array([self._ranks[site] for site in sites], np.int64)
        order_N = np.lexsort((~here_N, id_N, rank_S[site_N]))
        site_N, id_N, here_N = rank_S[site_N][order_N], id_N[order_N], here_N[order_N]
        first_N = np.ones(len(id_N), bool)
        first_N[1:] = (site_N[1:] != site_N[:-1]) | (id_N[1:] != id_N[:-1])
        self.site_N, self.id_N, self.here_N = site_N[first_N], id_N[first_N], here_N[first_N]
        # Where each of the questions that were given has its number.
        self.number_N = np.empty(len(order_N), np.int64)
        self.number_N[order_N] = np.cumsum(first_N) - 1

    def find(self, site: str, id_M: Numbers) -> Numbers:
        """The number of each question of a site; -1 for one that is not there."""
        rank = self._ranks.get(site, len(self.sites))
        start, stop = np.searchsorted(self.site_N, [rank, rank + 1])
        if start == stop:
            return np.full(len(id_M), -1)
        at_M = start + np.searchsorted(self.id_N[start:stop], id_M).clip(max=stop - start - 1)
        return np.where(self.id_N[at_M] == id_M, at_M, -1)


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

    `sites` has the site of each source. Gives counts for the report, of clusters as they are decided here, which is
    before posts are joined: a cluster may count questions that only the ledger knows, and ones that are left out later
    (for their language, say). Raises DataError where the ledger is none.
    """
    texts = _Stacked(folder)
    keys, links = _keys(texts, _links(folder, sites, LINK_KINDS[clustering.links]))
    label_N = np.arange(len(keys.id_N))
    by_text = 0
    for one_E, other_E in similar_pairs(
        map(texts.band, range(BANDS)),
        texts,
        together=lambda one, other: label_N[keys.number_N[one]] == label_N[keys.number_N[other]],
    ):
        one_E, other_E = keys.number_N[one_E], keys.number_N[other_E]
        by_text += int((label_N[one_E] != label_N[other_E]).sum())
        join(label_N, one_E, other_E)
    join(label_N, *links)
    past_N = _past(ledger, keys)
    member_M = np.flatnonzero(keys.here_N | (past_N >= 0))
    size_N = np.bincount(label_N[member_M], minlength=len(label_N))
    member_M = member_M[size_N[label_N[member_M]] > 1]
    member_M = member_M[np.argsort(label_N[member_M], kind="stable")]
    _, start_C = np.unique(label_N[member_M], return_index=True)
    first_M = np.repeat(start_C, np.diff([*start_C, len(member_M)]).astype(np.int64))
    split_M = decide(start_C, keys.sites, keys.site_N[member_M], keys.id_N[member_M], past_N[member_M], fractions)
    _write(folder / CLUSTERS, keys, member_M, first_M, split_M, buckets)
    return {
        "clusters": len(start_C),
        "questions in them": len(member_M),
        "largest": int(np.diff([*start_C, len(member_M)]).max(initial=0)),
        "joined by text": by_text,
        "links followed": len(links[0]),
        "clusters in eval": len(np.unique(first_M[split_M == SPLITS.index(EVAL)])),
        "questions that stay out for their past": int((split_M == NOWHERE).sum()),
    }


def join(label_N: Numbers, one_E: Numbers, other_E: Numbers) -> None:
    """Give all questions that edges tie together, through any number of others, the smallest number among them.

    `label_N` has for each question the number of its cluster so far, and is changed.
    """
    while True:
        one, other = label_N[one_E], label_N[other_E]
        apart = one != other
        if not apart.any():
            return
        one_E, other_E = one_E[apart], other_E[apart]
        np.minimum.at(label_N, np.maximum(one[apart], other[apart]), np.minimum(one[apart], other[apart]))
        while (label_N != (shorter := label_N[label_N])).any():
            label_N[:] = shorter


def _groups(code_N: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Each code with the places where it stands, in one pass however many codes there are."""
    order_N = np.argsort(code_N, kind="stable")
    codes, starts = np.unique(code_N[order_N], return_index=True)
    yield from zip(codes.tolist(), np.split(order_N, starts[1:]), strict=False)


_LARGE = 1 << 26  # bytes of signatures that may be held


class _Mapped:
    """An array on disk of which parts are read; of a large one none stays in memory."""

    def __init__(self, path: Path, large: bool) -> None:
        self._array = open_memmap(path, mode="r")
        self._large = large and hasattr(mmap, "MADV_DONTNEED")
        self.length = len(self._array)

    def __getitem__(self, some: int | Numbers) -> NDArray[Any]:
        """A copy of some of its rows."""
        found = np.array(self._array[some])
        if self._large:  # or the system counts what was read as memory of this process
            pages: Any = self._array.base
            pages.madvise(mmap.MADV_DONTNEED)
        return found


class _Stacked:
    """What the pieces left of their questions, one below the other, on disk."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.signatures.npy"))
        names = [path.name.removesuffix(".signatures.npy") for path in paths]
        large = sum(path.stat().st_size for path in paths) > _LARGE
        self._signatures = [_Mapped(path, large) for path in paths]
        self._bands = [_Mapped(folder / f"{name}.bands.npy", large) for name in names]
        self._ends = np.cumsum([0, *(one.length for one in self._signatures)])
        self._asked = [folder / f"{name}.asked" for name in names]

    def asked(self) -> Iterator[tuple[str, Numbers, Numbers]]:
        """(site, numbers, ids) of the questions of a site in a piece."""
        for path, end in zip(self._asked, self._ends, strict=False):
            with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source) as reader:
                table = reader.read_all()
            site = table["site"].combine_chunks()
            code, ids = site.indices.to_numpy(), table["id"].to_numpy()
            for at, mine in _groups(code):
                yield site.dictionary[at].as_py(), end + mine, ids[mine]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def band(self, number: int) -> NDArray[np.uint64]:
        """The keys (N,) of all texts in a band."""
        return np.concatenate([np.zeros(0, np.uint64), *(one[number] for one in self._bands)])

    def __getitem__(self, number_N: Numbers) -> Signatures:
        """The signatures (N, K) of some texts."""
        found = np.empty((len(number_N), BINS), np.uint32)
        piece_N = np.searchsorted(self._ends, number_N, side="right") - 1
        for piece in np.unique(piece_N):
            mine = piece_N == piece
            found[mine] = self._signatures[piece][number_N[mine] - self._ends[piece]]
        return found


Ends = tuple[str, Numbers, NDArray[np.bool_]]
"""The ends of links at one site: ids, and whether they are in the dumps; ends 2 n and 2 n + 1 are tied."""


def _links(folder: Path, sites: Mapping[int, str], kinds: Sequence[int]) -> list[Ends]:
    links = pq.read_table(folder / LINKS)
    links = links.filter(pc.is_in(links["kind"], pa.array(kinds, pa.int32())))
    found = []
    for source, site in sites.items():
        mine = links.filter(pc.equal(links["source"], source))
        ids, here = (
            np.column_stack([mine[one].to_numpy(), mine[other].to_numpy()]).ravel()
            for one, other in (("id", "related"), ("id_here", "related_here"))
        )
        found.append((site, ids, here))
    return found


def _keys(texts: _Stacked, links: Sequence[Ends]) -> tuple[Keys, tuple[Numbers, Numbers]]:
    """The keys of all questions with a text, and then of all ends of links; and the numbers that links tie."""
    sites: list[str] = []
    count = len(texts) + sum(len(ids) for _, ids, _ in links)
    site_N, id_N, here_N = np.zeros(count, np.int64), np.zeros(count, np.int64), np.ones(count, bool)
    for site, numbers, ids in texts.asked():
        site_N[numbers], id_N[numbers] = len(sites), ids
        sites.append(site)
    start = len(texts)
    for site, ids, here in links:
        some = slice(start, start + len(ids))
        site_N[some], id_N[some], here_N[some] = len(sites), ids, here
        sites.append(site)
        start += len(ids)
    keys = Keys(sites, site_N, id_N, here_N)
    ends = keys.number_N[len(texts) :]
    return keys, (ends[::2], ends[1::2])


def _past(ledger: Path, keys: Keys) -> NDArray[np.int64]:
    """The number of the split that the ledger has for each question, -1 where it has none."""
    past_N = np.full(len(keys.id_N), -1)
    for lot in read_ledger(ledger):
        code_M = pc.index_in(lot["split"], pa.array(SPLITS)).to_numpy()
        sites = lot["site"].combine_chunks().dictionary_encode()
        for code, mine in _groups(sites.indices.to_numpy()):
            at_M = keys.find(sites.dictionary[code].as_py(), lot["id"].to_numpy()[mine])
            past_N[at_M[at_M >= 0]] = code_M[mine][at_M >= 0]
    return past_N


def _write(path: Path, keys: Keys, member_M: Numbers, first_M: Numbers, split_M: Numbers, buckets: int) -> None:
    """Write the members, sorted by bucket. A cluster is named by its smallest question (the place of which is in
    `first_M`); a split may be empty.
    """
    site_M, id_M = keys.site_N[member_M], keys.id_N[member_M]
    site, number = pa.array(keys.sites, pa.string()).take(pa.array(site_M)), pa.array(id_M).cast(pa.string())
    bucket_M = bucket_of(pa.chunked_array([site]), id_M, buckets)
    table = pa.table(
        [
            pa.array(bucket_M),
            site,
            pa.array(id_M),
            pc.binary_join_element_wise(site.take(pa.array(first_M)), number.take(pa.array(first_M)), "/"),
            pa.array([*SPLITS, ""]).take(pa.array(split_M)),
        ],
        schema=MEMBERS,
    )
    pq.write_table(table.take(pa.array(np.argsort(bucket_M, kind="stable"))), path, row_group_size=1 << 15)


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
