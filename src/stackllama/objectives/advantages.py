"""Advantages: how much better than expected each sampled token turned out. Pure tensor functions.

N: response tokens of the batch. S: responses. T: tokens of the longest response (see `masked.py` for the layout).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackllama.objectives.masked import columns, to_matrix


@torch.no_grad()
def gae(rewards_N: Tensor, values_N: Tensor, sequence_N: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Give generalised advantages and returns; an episode ends at its response's last token (nothing follows it).

    With delta_t = r_t + gamma * V_{t+1} - V_t and V = 0 behind the last token:
    A_t = delta_t + gamma * lam * A_{t+1}, return_t = A_t + V_t.

    rewards_N, values_N: float32 or float64 (N); sequence_N: int64 (N), in 0..S-1, each response contiguous and in
    order; gamma, lam: 0 to 1. Returns (advantages_N, returns_N), without gradient. A response's result never depends on
    another. Raises ValueError for other dtypes, shapes that differ, or values out of range. Source: Schulman et al.
    2016, "High-dimensional continuous control using generalized advantage estimation", eq. 16.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} is {number}, allowed is 0 to 1")
    if rewards_N.dtype != values_N.dtype or rewards_N.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rewards are {rewards_N.dtype} and values {values_N.dtype}: give both as float32 or float64")
    if rewards_N.shape != values_N.shape:
        raise ValueError(f"shapes of rewards {tuple(rewards_N.shape)} and values {tuple(values_N.shape)} differ")
    sequences = int(sequence_N.max()) + 1 if sequence_N.numel() else 0
    column_N = columns(sequence_N)
    value_TS = to_matrix(values_N, sequence_N, column_N, sequences)
    # The zeros of the matrix are what stands behind a last token: value 0 and advantage 0. So no mask is needed.
    value_after_TS = torch.cat([value_TS[1:], value_TS.new_zeros((1, sequences))])[: len(value_TS)]
    delta_TS = to_matrix(rewards_N, sequence_N, column_N, sequences) + gamma * value_after_TS - value_TS
    advantage_TS = torch.empty_like(delta_TS)
    running_S = delta_TS.new_zeros(sequences)
    for time in reversed(range(len(delta_TS))):
        running_S = delta_TS[time] + gamma * lam * running_S
        advantage_TS[time] = running_S
    advantages_N = advantage_TS[column_N, sequence_N]
    return advantages_N, advantages_N + values_N
