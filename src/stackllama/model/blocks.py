"""Attention over forests on the CPU: one opaque operator with its own backward.

The row is cut into *blocks*: at most ``QUERY_CHUNK`` neighbouring queries of one segment against the keys they may see
(their root, and their own segment up to the last of them), so the work follows the forest's real edges. Blocks of like
size are batched. Scores and probabilities live only while a block group is computed; the backward computes them again.

Legend: T tokens, H query heads, K key/value heads, G = H / K, E head dimension, S blocks of a group, Q queries and L
keys of a block (padded within the group).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from stackllama.model.attention import Rule, probabilities
from stackllama.tokens.forest import Forest, Segment

QUERY_CHUNK = 128
# A group may pad its blocks to this multiple of their real area: beyond it, a second small batch is cheaper than the
# waste.
PADDING_LIMIT = 1.3
# Scores of one group of blocks, in elements per head: bounds the memory of long rows.
GROUP_AREA = 1 << 21


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Blocks of like size, padded to S x Q queries and S x L keys.

    query_SQ, key_SL: places in the row (padding points at place 0); valid_SQ: false for padding queries; hidden_SQL:
    true where a query must not see a key; distance_SQL: position of the query minus that of the key.
    """

    query_SQ: Tensor
    key_SL: Tensor
    valid_SQ: Tensor
    hidden_SQL: Tensor
    distance_SQL: Tensor


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The blocks of one row."""

    groups: tuple[BlockGroup, ...]

    def attend(self, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, rule: Rule) -> Tensor:
        """What every token (T, H, E) gathers from those that it sees; differentiable.

        Raises:
            ValueError: for sinks that are trained, which have no gradient here.
        """
        if rule.sinks_H is not None and torch.is_grad_enabled() and rule.sinks_H.requires_grad:
            raise ValueError(
                "attention sinks (s_aux) cannot be trained by forest attention; freeze them or train by LoRA"
            )
        out = _BlockAttention.apply(query_THE, key_TKE, value_TKE, self, rule)  # type: ignore[no-untyped-call]
        return cast("Tensor", out)


@dataclass(frozen=True, slots=True)
class _Block:
    queries: range
    keys: tuple[range, range]

    @property
    def area(self) -> int:
        return len(self.queries) * self.key_count

    @property
    def key_count(self) -> int:
        return len(self.keys[0]) + len(self.keys[1])


def plan_blocks(forest: Forest) -> BlockPlan:
    """Cut a row into block groups."""
    return BlockPlan(tuple(_batch(group, forest.positions_T) for group in _groups(forest.segments)))


def _groups(segments: Sequence[Segment]) -> list[list[_Block]]:
    blocks = [
        _Block(range(start, stop), keys)
        for segment in segments
        for start in range(segment.start, segment.stop, QUERY_CHUNK)
        for stop in (min(start + QUERY_CHUNK, segment.stop),)
        for keys in (
            (range(segment.start, stop), range(0))
            if segment.is_root
            else (range(segment.root_start, segment.root_stop), range(segment.start, stop)),
        )
    ]
    blocks.sort(key=lambda block: (block.key_count, len(block.queries)), reverse=True)
    groups: list[list[_Block]] = []
    for block in blocks:
        if groups and _fits(groups[-1], block):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def _fits(group: Sequence[_Block], block: _Block) -> bool:
    grown = [*group, block]
    padded = len(grown) * max(len(b.queries) for b in grown) * max(b.key_count for b in grown)
    return padded <= GROUP_AREA and padded <= PADDING_LIMIT * sum(b.area for b in grown) + 4096


def _batch(blocks: Sequence[_Block], positions_T: Tensor) -> BlockGroup:
    queries = max(len(block.queries) for block in blocks)
    keys = max(block.key_count for block in blocks)
    query_SQ = torch.zeros(len(blocks), queries, dtype=torch.int64)
    key_SL = torch.zeros(len(blocks), keys, dtype=torch.int64)
    valid_SQ = torch.zeros(len(blocks), queries, dtype=torch.bool)
    valid_SL = torch.zeros(len(blocks), keys, dtype=torch.bool)
    for row, block in enumerate(blocks):
        query_SQ[row, : len(block.queries)] = torch.arange(block.queries.start, block.queries.stop)
        valid_SQ[row, : len(block.queries)] = True
        first, second = block.keys
        key_SL[row, : len(first)] = torch.arange(first.start, first.stop)
        key_SL[row, len(first) : block.key_count] = torch.arange(second.start, second.stop)
        valid_SL[row, : block.key_count] = True
    visible_SQL = valid_SL[:, None, :] & (key_SL[:, None, :] <= query_SQ[:, :, None])
    # A padding query sees the first key only: its probabilities stay finite, and nothing of it is used.
    visible_SQL = torch.where(valid_SQ[:, :, None], visible_SQL, torch.arange(keys) == 0)
    distance_SQL = positions_T[query_SQ][:, :, None] - positions_T[key_SL][:, None, :]
    return BlockGroup(query_SQ, key_SL, valid_SQ, ~visible_SQL, distance_SQL)


def _gather(rows_TFE: Tensor, places_SN: Tensor, heads: int) -> Tensor:
    """Rows at the places, batched by block and key/value head: (S * K, G * N, E)."""
    blocks, count = places_SN.shape
    total, size = rows_TFE.shape[1:]
    picked = rows_TFE.index_select(0, places_SN.flatten()).view(blocks, count, heads, total // heads, size)
    return picked.permute(0, 2, 3, 1, 4).reshape(blocks * heads, total // heads * count, size)


def _scatter_shape(batched: Tensor, blocks: int, heads: int, count: int) -> Tensor:
    """The inverse of `_gather`: (S * N, H, E)."""
    size = batched.shape[-1]
    spread = batched.view(blocks, heads, -1, count, size)
    return spread.permute(0, 3, 1, 2, 4).reshape(blocks * count, -1, size)


def _group_hidden(group: BlockGroup, window: int | None) -> Tensor:
    if window is None:
        return group.hidden_SQL
    outside = (group.distance_SQL >= window) & group.valid_SQ[:, :, None]
    return group.hidden_SQL | outside


class _BlockAttention(torch.autograd.Function):
    """softmax(q k' + mask) v over the blocks of a plan; q, k, v are (T, heads, E) in one precision."""

    @staticmethod
    def forward(ctx: Any, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, plan: BlockPlan, rule: Rule) -> Tensor:
        heads = key_TKE.shape[1]
        out_THE = torch.empty_like(query_THE)
        for group in plan.groups:
            prob_BRL, _ = _attend(query_THE, key_TKE, group, rule)
            mixed = torch.bmm(prob_BRL, _gather(value_TKE, group.key_SL, heads))
            blocks, count = group.query_SQ.shape
            valid = group.valid_SQ.flatten()
            out_THE[group.query_SQ.flatten()[valid]] = _scatter_shape(mixed, blocks, heads, count)[valid]
        ctx.save_for_backward(query_THE, key_TKE, value_TKE)
        ctx.plan, ctx.rule = plan, rule
        return out_THE

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad_THE,) = grad_outputs
        query_THE, key_TKE, value_TKE = ctx.saved_tensors
        rule: Rule = ctx.rule
        heads = key_TKE.shape[1]
        grad_query = torch.empty_like(query_THE)
        # A root's keys gather gradients from all of its branches: summed in fp32, rounded once.
        grad_key = torch.zeros(key_TKE.shape, dtype=torch.float32)
        grad_value = torch.zeros(value_TKE.shape, dtype=torch.float32)
        for group in ctx.plan.groups:
            blocks, count = group.query_SQ.shape
            length = group.key_SL.shape[1]
            valid = group.valid_SQ.flatten()
            prob_BRL, slope = _attend(query_THE, key_TKE, group, rule)
            key_BLE, value_BLE = (_gather(x, group.key_SL, heads) for x in (key_TKE, value_TKE))
            query_BRE, grad_BRE = (_gather(x, group.query_SQ, heads) for x in (query_THE, grad_THE.to(query_THE.dtype)))
            grad_BRE = grad_BRE.masked_fill(_pad_rows(group, heads, grad_BRE.shape[1]), 0.0)
            d_value = torch.bmm(prob_BRL.transpose(1, 2), grad_BRE)
            d_prob = torch.bmm(grad_BRE, value_BLE.transpose(1, 2)).float()
            prob = prob_BRL.float()
            d_score = (d_prob - (d_prob * prob).sum(-1, keepdim=True)).mul_(prob)
            if slope is not None:
                d_score.mul_(slope)
            d_score = d_score.mul_(rule.scaling).to(query_THE.dtype)
            d_query = _scatter_shape(torch.bmm(d_score, key_BLE), blocks, heads, count)
            grad_query[group.query_SQ.flatten()[valid]] = d_query[valid]
            places = group.key_SL.flatten()
            d_key = torch.bmm(d_score.transpose(1, 2), query_BRE)
            grad_key.index_add_(0, places, _scatter_shape(d_key, blocks, heads, length).float())
            grad_value.index_add_(0, places, _scatter_shape(d_value, blocks, heads, length).float())
        return grad_query, grad_key.to(key_TKE.dtype), grad_value.to(value_TKE.dtype), None, None


def _pad_rows(group: BlockGroup, heads: int, rows: int) -> Tensor:
    """True at the rows (S * K, G * Q, 1) of padding queries."""
    blocks, count = group.query_SQ.shape
    spread = (~group.valid_SQ)[:, None, None, :].expand(blocks, heads, rows // count, count)
    return spread.reshape(blocks * heads, rows, 1)


def _attend(query_THE: Tensor, key_TKE: Tensor, group: BlockGroup, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Probabilities (S * K, G * Q, L) of a group in the inputs' precision, and d capped / d score where there is a
    softcap.
    """
    heads = key_TKE.shape[1]
    blocks, count = group.query_SQ.shape
    ratio = query_THE.shape[1] // heads
    query_BRE = _gather(query_THE, group.query_SQ, heads)
    key_BLE = _gather(key_TKE, group.key_SL, heads)
    scores = torch.bmm(query_BRE, key_BLE.transpose(1, 2)).float().mul_(rule.scaling)
    slope = None if rule.softcap is None else 1.0 - torch.tanh(scores / rule.softcap).square()
    spread = scores.view(blocks, heads * ratio, count, -1)
    prob = probabilities(spread, _group_hidden(group, rule.window)[:, None], rule)
    return prob.reshape(scores.shape).to(query_THE.dtype), slope
