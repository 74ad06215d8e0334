"""Sums and whitening over ragged responses that are laid end to end.

Two responses of 3 and 2 tokens, N = 5 tokens in all, S = 2 sequences, the longest of T = 3 tokens:

    x_N         a  b  c  d  e
    sequence_N  0  0  0  1  1          which response a token belongs to
    column      0  1  2  0  1          its place in that response
    x_TS        a d / b e / c 0        a row for each place, a column for each response, zeros where there is no token

N: response tokens of the batch. S: responses. T: tokens of the longest response.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_DEVIATION = 1e-8  # added to the deviation, so that equal numbers become zeros instead of NaN


def columns(sequence_N: Tensor) -> Tensor:
    """Give the place of each token in its own response.

    sequence_N: int64 (N), the tokens of a response contiguous and in order. Returns int64 (N).
    Raises ValueError if the tokens of a response are not contiguous.
    """
    first_N = torch.ones_like(sequence_N, dtype=torch.bool)
    first_N[1:] = sequence_N[1:] != sequence_N[:-1]
    if int(first_N[1:].sum()) != int(sequence_N.sort().values.diff().count_nonzero()):
        raise ValueError("the tokens of a sequence are not contiguous: keep each response's tokens together, in order")
    token_N = torch.arange(sequence_N.numel(), device=sequence_N.device)
    start_N = torch.where(first_N, token_N, 0).cummax(0).values if token_N.numel() else token_N
    return token_N - start_N


def to_matrix(x_N: Tensor, sequence_N: Tensor, column_N: Tensor, sequences: int) -> Tensor:
    """Spread the tokens over a (T, S) matrix that is zero where there is no token.

    x_N: any dtype (N); sequence_N: int64 (N), in 0..S-1; column_N: int64 (N), from `columns`; sequences: S.
    Back again: `x_TS[column_N, sequence_N]`. Raises ValueError for shapes that differ or a sequence outside 0..S-1.
    """
    if x_N.ndim != 1 or x_N.shape != sequence_N.shape:
        raise ValueError(f"shapes {tuple(x_N.shape)} and {tuple(sequence_N.shape)}: give one number for each token")
    if not x_N.numel():
        return x_N.new_zeros((0, sequences))
    low, high = int(sequence_N.min()), int(sequence_N.max())
    if low < 0 or high >= sequences:
        raise ValueError(f"sequence_N holds {low}..{high}, allowed are 0..{sequences - 1}")
    empty_TS = x_N.new_zeros((int(column_N.max()) + 1, sequences))
    return empty_TS.index_put((column_N, sequence_N), x_N)


def sum_per_sequence(x_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """Add up the tokens of each response; a response without tokens sums to 0.

    x_N: float (N); sequence_N: int64 (N), in 0..S-1, contiguous; sequences: S. Returns x_N's dtype (S), differentiable.
    Adds in float64 over a matrix, not with `index_add_`, whose order on a GPU changes from run to run.
    Raises ValueError as `columns` and `to_matrix` do.
    """
    return to_matrix(x_N.double(), sequence_N, columns(sequence_N), sequences).sum(0).to(x_N.dtype)


def whiten(x_N: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to deviation 1 over all tokens, and shift to mean 0 unless `shift_mean` is off (the mean then stays).

    x_N: float (N). Returns x_N's dtype (N). The deviation is that of the population (divided by N, not N - 1), so that
    one token gives 0 rather than NaN. Worked out in float64: in float32 the rounding of a mean would be blown up to 1
    when all the numbers are equal. Source: Huang et al. 2023, "The N implementation details of RLHF with PPO", on
    whitening rewards and advantages.
    """
    x64_N = x_N.double()
    mean = x64_N.mean()
    centred_N = x64_N - mean
    white_N = centred_N / (centred_N.square().mean().sqrt() + SMALLEST_DEVIATION)
    return (white_N if shift_mean else white_N + mean).to(x_N.dtype)
