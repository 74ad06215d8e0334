"""Runs of queries, each with the run of keys that it sees: what flash kernels are called with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Runs:
    """R runs of queries that lie end to end, and of keys that do; a run sees the keys of the same number.

    query_stops, key_stops: where each run ends; a 0 stands before them. query_stops_R, key_stops_R: the same on the
    device, int32.
    """

    query_stops: tuple[int, ...]
    key_stops: tuple[int, ...]
    query_stops_R: Tensor
    key_stops_R: Tensor

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """The places of each run's queries and keys."""
        for queries, keys in zip(pairwise(self.query_stops), pairwise(self.key_stops), strict=True):
            yield slice(*queries), slice(*keys)

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the longest runs."""
        queries, keys = (max(b - a for a, b in pairwise(stops)) for stops in (self.query_stops, self.key_stops))
        return queries, keys


def runs_of(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Runs:
    """Runs of these lengths."""
    stops = [tuple(accumulate(lengths, initial=0)) for lengths in (queries, keys)]
    # Without waiting for what the device has yet to do: so small a copy leaves the host's memory at once.
    on_device = [torch.tensor(one, dtype=torch.int32).to(device, non_blocking=True) for one in stops]
    return Runs(stops[0], stops[1], on_device[0], on_device[1])
