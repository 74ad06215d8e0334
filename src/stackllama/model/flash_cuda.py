"""Calls of the flash kernel for CUDA (FlashAttention 2, in torch): all runs in one, keys shared by their query heads.

Legend: T tokens, H query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from stackllama.model.runs import Runs

WIDEST_HEAD = 256
"""Features of a head, at most."""


def forward(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, runs: Runs, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """What the queries gather (T, H, E), and the logarithms (H, T) of the sums of their softmax, fp32."""
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        *(query_THE, key_TKE, value_TKE, runs.query_stops_R, runs.key_stops_R, *runs.longest, 0.0, causal, False),
        scale=scaling,
    )
    return out, sums


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
    """The runs' share of the gradients of queries, keys and values; out_THE and sum_HT are of the whole softmax."""
    state = torch.empty(2, dtype=torch.uint64, device=query_THE.device)  # of a dropout, of which there is none
    found = torch.ops.aten._flash_attention_backward(
        *(grad_THE, query_THE, key_TKE, value_TKE, out_THE, sum_HT, runs.query_stops_R, runs.key_stops_R),
        *(*runs.longest, 0.0, causal, state, state),
        scale=scaling,
    )
    return cast("tuple[Tensor, Tensor, Tensor]", found)
