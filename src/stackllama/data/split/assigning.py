"""Which question belongs to which of the five splits, for good.

A question's split is a pure hash of its cluster (itself and its duplicates), so it needs no seed and does not depend on
what else is in the dump. A ledger (`ledger.py`) remembers past assignments, so that later dumps, other fractions and
newly found duplicates move nothing: what was held out once stays held out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stackllama.errors import DataError

SPLITS = ("sft", "reward", "judge", "ppo", "eval")
EVAL = "eval"
NOWHERE = len(SPLITS)
"""Stands for a split where a question may be used in none."""

Key = tuple[str, int]
"""(site, id) of a question."""

LEDGER = pa.schema(
    [
        pa.field("site", pa.string(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ],
    metadata={"stackllama": "ledger 1"},
)
"""What a ledger remembers of a question."""


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raises DataError unless `fractions` are shares of known splits that add up to 1."""
    unknown = sorted(set(fractions) - set(SPLITS))
    if unknown:
        raise DataError(f"no such split: {', '.join(unknown)}; the splits are {', '.join(SPLITS)}")
    if any(not 0 <= share <= 1 for share in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise DataError(
            f"the fractions {dict(fractions)} are not shares of 1; give numbers from 0 to 1 that add up to 1"
        )


def assign(site: str, id: int, fractions: Mapping[str, float]) -> str:  # noqa: A002 - the record's own word
    """The split of the cluster that (site, id) stands for: a hash of these two alone, compared with `fractions`."""
    return assigner(fractions)(site, id)


def assigner(fractions: Mapping[str, float]) -> Callable[[str, int], str]:
    """`assign` for many clusters under the same fractions. Raises DataError where these are no shares of 1."""
    check_fractions(fractions)
    shares = [split for split in SPLITS if fractions.get(split, 0) > 0]
    edges = list(accumulate(fractions[split] for split in shares))

    def assign(site: str, number: int) -> str:
        digest = blake2b(f"{site}\0{number}".encode(), digest_size=8, person=b"split").digest()
        point = int.from_bytes(digest, "big") / 2**64
        # 2**64 - 1 rounds up to a point of 1.0, and shares may add up to a hair less than 1: the last split has these.
        return shares[min(bisect_right(edges, point), len(shares) - 1)]

    return assign


def decide(
    start_C: NDArray[np.int64],
    sites: Sequence[str],
    site_M: NDArray[np.int64],
    id_M: NDArray[np.int64],
    past_M: NDArray[np.int64],
    fractions: Mapping[str, float],
) -> NDArray[np.int64]:
    """The split of every member (M) of clusters (C) of several questions, as its place in `SPLITS`; `NOWHERE` for one
    that may be used in none.

    A cluster's members begin at `start_C`, sorted by site (its place in `sites`) and id. `past_M` is the place of the
    split where a member was before, -1 where it is new.

    - A cluster without a past goes where the hash of its smallest key points.
    - A cluster that touches eval goes to eval: its new members are eval, and those that were assigned to a training
      split before are dropped, since models may have been trained on them.
    - Any other cluster with a past goes where its smallest member with a past is; members that were assigned elsewhere
      are dropped, since no question and no duplicate of it may be in two splits.
    """
    assign = assigner(fractions)
    if not len(start_C):
        return np.zeros(0, np.int64)
    size_C = np.diff([*start_C, len(id_M)])
    # The place of the first member with a past; behind the end where there is none.
    known_M = np.where(past_M >= 0, np.arange(len(id_M)), len(id_M))
    known_C = np.minimum.reduceat(known_M, start_C)
    held_out_C = np.maximum.reduceat(past_M == SPLITS.index(EVAL), start_C)
    split_C = np.append(past_M, -1)[known_C]
    for cluster in np.flatnonzero(split_C < 0).tolist():
        first = start_C[cluster]
        split_C[cluster] = SPLITS.index(assign(sites[site_M[first]], int(id_M[first])))
    split_C[held_out_C] = SPLITS.index(EVAL)
    split_M = np.repeat(split_C, size_C)
    return np.where((past_M >= 0) & (past_M != split_M), NOWHERE, split_M)
