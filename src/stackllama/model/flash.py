"""Attention over forests by flash kernels: for attention without a window, a cap on the scores or sinks.

A token sees two runs of keys: its own segment up to itself, and its root. A root and the branch behind it are one text,
attended to causally, and so is every other branch by itself; that branch attends to its root besides, without a mask.
No score is worked out that no edge of the forest asks for. The two results of such a branch are parts of one softmax
and are joined by the logarithms of their sums. The backward gives both kernels the joined result and sums, by which
each finds its own share of the gradients.

    row         root 1 | branch | branch | branch | root 2 | branch | root 3
    causally    ---------------   ------   ------   ---------------   ------
    its root                      ---------------

Source: Dao et al. 2022, "FlashAttention", section 3.1 (parts of a softmax) and appendix B.2 (the backward).

Legend: T tokens of the row, B tokens of branches that do not stand behind their root, P tokens of those roots, H
query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from stackllama.model import flash_cpu, flash_cuda
from stackllama.model.runs import Runs, runs_of
from stackllama.tokens.forest import Forest, Segment


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """The runs of a row: its causal ones; and, where a tree has several branches, all but the first before its root:
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
    starts = [one.start for one in forest.segments if one.is_root or one.start != one.root_stop]
    own = [stop - start for start, stop in pairwise([*starts, len(forest)])]
    others: dict[tuple[int, int], list[Segment]] = {}
    for branch in forest.branches:
        if branch.start != branch.root_stop:
            others.setdefault((branch.root_start, branch.root_stop), []).append(branch)
    branches = [(of_tree[0].start, of_tree[-1].stop) for of_tree in others.values()]
    roots = None
    if others:
        roots = runs_of([stop - start for start, stop in branches], [stop - start for start, stop in others], device)
    return FlashPlan(runs_of(own, own, device), roots, _places(branches, device), _places([*others], device))


def _places(ends: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    places = [torch.arange(start, stop) for start, stop in ends] or [torch.empty(0, dtype=torch.int64)]
    return torch.cat(places).to(device, non_blocking=True)


class _FlashAttention(torch.autograd.Function):
    """softmax(q k' + mask) v over the runs of a plan; q, k, v are (T, heads, E) in one precision."""

    @staticmethod
    def forward(
        ctx: Any, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, plan: FlashPlan, scaling: float
    ) -> Tensor:
        kernel = flash_cuda if query_THE.is_cuda else flash_cpu
        out_THE, sum_HT = kernel.forward(query_THE, key_TKE, value_TKE, plan.own, scaling, causal=True)
        if plan.roots is not None:
            branch_B, root_P = plan.branch_B, plan.root_P
            root = (query_THE[branch_B], key_TKE[root_P], value_TKE[root_P])
            out_BHE, sum_HB = _joined(
                (out_THE[branch_B], sum_HT[:, branch_B]), kernel.forward(*root, plan.roots, scaling, causal=False)
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
        kernel = flash_cuda if query_THE.is_cuda else flash_cpu
        d_query, d_key, d_value = kernel.backward(
            grad_THE, query_THE, key_TKE, value_TKE, out_THE, sum_HT, plan.own, ctx.scaling, causal=True
        )
        if plan.roots is not None:
            branch_B, root_P = plan.branch_B, plan.root_P
            more = kernel.backward(
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
        rounded = (one.to(query_THE.dtype) for one in (d_query, d_key, d_value))
        return *rounded, None, None


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two parts of a softmax as one: what was gathered (B, H, E), and the logarithms (H, B) of the sums."""
    sum_HB = torch.logaddexp(first[1], second[1])
    shares = [(part_HB - sum_HB).exp_().T[:, :, None] for _, part_HB in (first, second)]
    out_BHE = first[0] * shares[0] + second[0] * shares[1]
    return out_BHE.to(first[0].dtype), sum_HB
