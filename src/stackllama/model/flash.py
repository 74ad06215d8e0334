"""Attention over forests by flash kernels: for attention without a window, a cap on the scores or sinks.

A token sees two runs of keys: its own segment up to itself, and its root. So each segment is attended to by itself,
causally, and each root by all branches of its tree at once, without a mask; no score is worked out that no edge of the
forest asks for. The two results of a branch are parts of one softmax and are joined by the logarithms of their sums.
The backward gives both kernels the joined result and sums, by which each finds its own share of the gradients.

    row         root 1 | branch | branch | root 2 | branch | root 3
    by itself   ------   ------   ------   ------   ------   ------
    its root             ---------------            ------

Source: Dao et al. 2022, "FlashAttention", section 3.1 (parts of a softmax) and appendix B.2 (the backward).

Legend: T tokens of the row, B tokens of branches, P tokens of roots that have some, L tokens of one run of queries, H
query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from stackllama.tokens.forest import Forest, Segment

WIDEST_HEAD = 256
"""Features of a head, at most, in the kernel for CUDA."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of queries that lie end to end, and of keys that do, each seen by the run of the same place.

    query_stops, key_stops: where each run ends; a 0 stands before them. On CUDA the same as tensors (int32).
    """

    query_stops: tuple[int, ...]
    key_stops: tuple[int, ...]
    query_stops_R: Tensor
    key_stops_R: Tensor

    def each(self) -> Iterator[tuple[slice, slice]]:
        """The places of each run's queries and keys."""
        for queries, keys in zip(pairwise(self.query_stops), pairwise(self.key_stops), strict=True):
            yield slice(*queries), slice(*keys)

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the longest runs."""
        return tuple(max(b - a for a, b in pairwise(stops)) for stops in (self.query_stops, self.key_stops))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """The runs of a row: every segment by itself; and, where there are branches, those of each tree before its root:
    branch_B and root_P are their places in the row.
    """

    own: Runs
    roots: Runs | None
    branch_B: Tensor
    root_P: Tensor

    def attend(self, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, scaling: float) -> Tensor:
        """What every token (T, H, E) gathers from those that it sees; differentiable."""
        out = _FlashAttention.apply(query_THE, key_TKE, value_TKE, self, scaling)  # type: ignore[no-untyped-call]
        return cast("Tensor", out)


def plan_flash(forest: Forest, device: torch.device) -> FlashPlan:
    """The plan of a row."""
    lengths = [segment.length for segment in forest.segments]
    trees: dict[tuple[int, int], list[Segment]] = {}
    for branch in forest.branches:
        trees.setdefault((branch.root_start, branch.root_stop), []).append(branch)
    branches = [(of_tree[0].start, of_tree[-1].stop) for of_tree in trees.values()]
    roots = None
    if trees:
        roots = _runs([stop - start for start, stop in branches], [stop - start for start, stop in trees], device)
    return FlashPlan(_runs(lengths, lengths, device), roots, _places(branches, device), _places([*trees], device))


def _runs(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Runs:
    stops = [tuple(accumulate(lengths, initial=0)) for lengths in (queries, keys)]
    # Without waiting for what the device has yet to do: so small a copy leaves the host's memory at once.
    tensors = [torch.tensor(one, dtype=torch.int32).to(device, non_blocking=True) for one in stops]
    return Runs(stops[0], stops[1], tensors[0], tensors[1])


def _places(ends: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    places = [torch.arange(start, stop) for start, stop in ends] or [torch.empty(0, dtype=torch.int64)]
    return torch.cat(places).to(device, non_blocking=True)


class _FlashAttention(torch.autograd.Function):
    """softmax(q k' + mask) v over the runs of a plan; q, k, v are (T, heads, E) in one precision."""

    @staticmethod
    def forward(
        ctx: Any, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, plan: FlashPlan, scaling: float
    ) -> Tensor:
        out_THE, sum_HT = _forward(query_THE, key_TKE, value_TKE, plan.own, scaling, causal=True)
        if plan.roots is not None:
            branch_B, root_P = plan.branch_B, plan.root_P
            root = (query_THE[branch_B], key_TKE[root_P], value_TKE[root_P])
            out_BHE, sum_HB = _joined(
                (out_THE[branch_B], sum_HT[:, branch_B]), _forward(*root, plan.roots, scaling, causal=False)
            )
            out_THE[branch_B], sum_HT[:, branch_B] = out_BHE, sum_HB
        ctx.save_for_backward(query_THE, key_TKE, value_TKE, out_THE, sum_HT)
        ctx.plan, ctx.scaling = plan, scaling
        return out_THE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_THE, key_TKE, value_TKE, out_THE, sum_HT = ctx.saved_tensors
        plan: FlashPlan = ctx.plan
        grad_THE = grads[0].to(query_THE.dtype).contiguous()
        d_query, d_key, d_value = _backward(
            grad_THE, query_THE, key_TKE, value_TKE, out_THE, sum_HT, plan.own, ctx.scaling, causal=True
        )
        if plan.roots is not None:
            branch_B, root_P = plan.branch_B, plan.root_P
            more = _backward(
                grad_THE[branch_B],
                query_THE[branch_B],
                key_TKE[root_P],
                value_TKE[root_P],
                out_THE[branch_B],
                sum_HT[:, branch_B].contiguous(),
                plan.roots,
                ctx.scaling,
                causal=False,
            )
            for total, places, found in zip((d_query, d_key, d_value), (branch_B, root_P, root_P), more, strict=True):
                total[places] += found
        return d_query, d_key, d_value, None, None


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two parts of a softmax as one: what was gathered (B, H, E), and the logarithms (H, B) of the sums."""
    sum_HB = torch.logaddexp(first[1], second[1])
    shares = [(part_HB - sum_HB).exp_().T[:, :, None] for _, part_HB in (first, second)]
    out_BHE = first[0] * shares[0] + second[0] * shares[1]
    return out_BHE.to(first[0].dtype), sum_HB


def _forward(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, runs: Runs, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """What the queries gather (T, H, E), and the logarithms (H, T) of the sums of their softmax, fp32."""
    if query_THE.is_cuda:
        out, sums, *_ = torch.ops.aten._flash_attention_forward(
            *(query_THE, key_TKE, value_TKE, runs.query_stops_R, runs.key_stops_R, *runs.longest),
            *(0.0, causal, False),
            scale=scaling,
        )
        return out, sums
    out_THE = torch.empty_like(query_THE)
    sum_HT = query_THE.new_empty(
        query_THE.shape[1], len(query_THE), dtype=torch.promote_types(query_THE.dtype, torch.float32)
    )
    keys, values = (_for_each_head(one, query_THE.shape[1]) for one in (key_TKE, value_TKE))
    for queries, places in runs.each():
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_batched, (query_THE[queries], keys[places], values[places])), 0.0, causal, scale=scaling
        )
        out_THE[queries], sum_HT[:, queries] = out[0].transpose(0, 1), sums[0]
    return out_THE, sum_HT


def _backward(
    grad_THE: Tensor,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    out_THE: Tensor,
    sum_HT: Tensor,
    runs: Runs,
    scaling: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The runs' share of the gradients of queries, keys and values; out_THE and sum_HT are of the whole softmax."""
    if query_THE.is_cuda:
        state = torch.empty(2, dtype=torch.uint64, device=query_THE.device)  # of a dropout that there is none of
        found = torch.ops.aten._flash_attention_backward(
            *(grad_THE, query_THE, key_TKE, value_TKE, out_THE, sum_HT, runs.query_stops_R, runs.key_stops_R),
            *(*runs.longest, 0.0, causal, state, state),
            scale=scaling,
        )
        return cast("tuple[Tensor, Tensor, Tensor]", found)
    keys, values = (_for_each_head(one, query_THE.shape[1]) for one in (key_TKE, value_TKE))
    d_query, d_keys, d_values = (torch.empty_like(one) for one in (query_THE, keys, values))
    for queries, places in runs.each():
        given = (grad_THE[queries], query_THE[queries], keys[places], values[places], out_THE[queries])
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_batched, given), sum_HT[None, :, queries], 0.0, causal, scale=scaling
        )
        d_query[queries], d_keys[places], d_values[places] = (one[0].transpose(0, 1) for one in found)
    heads = key_TKE.shape[1]
    return d_query, _for_each_key(d_keys, heads), _for_each_key(d_values, heads)


def _batched(rows_LHE: Tensor) -> Tensor:
    """(1, H, L, E), as the kernel for the CPU has it."""
    return rows_LHE.transpose(0, 1)[None]


def _for_each_head(rows_TKE: Tensor, heads: int) -> Tensor:
    """Keys or values (T, H, E), one for each query head: the kernel for the CPU wants them so."""
    ratio = heads // rows_TKE.shape[1]
    return rows_TKE if ratio == 1 else rows_TKE.repeat_interleave(ratio, 1)


def _for_each_key(rows_THE: Tensor, heads: int) -> Tensor:
    """The sums (T, K, E) over the query heads that share a key."""
    return rows_THE if rows_THE.shape[1] == heads else rows_THE.unflatten(1, (heads, -1)).sum(2)
