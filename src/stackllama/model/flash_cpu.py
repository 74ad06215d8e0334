"""Calls of the flash kernel for the CPU (in torch): one for each run, with a key for each query head.

Legend: T tokens, H query heads, K key/value heads, E head dimension, L tokens of a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackllama.model.runs import Runs


def forward(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, runs: Runs, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """What the queries gather (T, H, E), and the logarithms (H, T) of the sums of their softmax, fp32 at least."""
    tokens, heads, _ = query_THE.shape
    out_THE, sum_HT = torch.empty_like(query_THE), query_THE.new_empty(heads, tokens, dtype=_wide(query_THE))
    keys, values = (_for_each_head(one, heads) for one in (key_TKE, value_TKE))
    for queries, places in runs:
        given = (query_THE[queries], keys[places], values[places])
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_batched, given), 0.0, causal, scale=scaling
        )
        out_THE[queries], sum_HT[:, queries] = out[0].transpose(0, 1), sums[0]
    return out_THE, sum_HT


def backward(
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
    """The runs' share of the gradients of queries, keys and values; out_THE and sum_HT are of the whole softmax.

    In fp32 at least: that is no slower here, and what several branches give a root is rounded once.
    """
    wide = _wide(query_THE)
    grad, query, out = (one.to(wide) for one in (grad_THE, query_THE, out_THE))
    keys, values = (_for_each_head(one.to(wide), query.shape[1]) for one in (key_TKE, value_TKE))
    d_query, d_keys, d_values = (torch.empty_like(one) for one in (query, keys, values))
    for queries, places in runs:
        given = (grad[queries], query[queries], keys[places], values[places], out[queries])
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_batched, given), sum_HT[None, :, queries], 0.0, causal, scale=scaling
        )
        d_query[queries], d_keys[places], d_values[places] = (one[0].transpose(0, 1) for one in found)
    heads = key_TKE.shape[1]
    return d_query, _for_each_key(d_keys, heads), _for_each_key(d_values, heads)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _batched(rows_LHE: Tensor) -> Tensor:
    """(1, H, L, E), as the kernel has it."""
    return rows_LHE.transpose(0, 1)[None]


def _for_each_head(rows_TKE: Tensor, heads: int) -> Tensor:
    """Keys or values (T, H, E), one for each query head."""
    ratio = heads // rows_TKE.shape[1]
    return rows_TKE if ratio == 1 else rows_TKE.repeat_interleave(ratio, 1)


def _for_each_key(rows_THE: Tensor, heads: int) -> Tensor:
    """The sums (T, K, E) over the query heads that share a key."""
    return rows_THE if rows_THE.shape[1] == heads else rows_THE.unflatten(1, (heads, -1)).sum(2)
