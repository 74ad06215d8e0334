"""Drawing tokens: pure functions of log-probabilities and a keyed uniform number.

The noise of a token is a hash of (seed, request, token index). It never depends on the slot or the batch in which a
request happens to be, so a request's tokens are the same whatever is sampled beside it.

Legend: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): a bijection of 64 bits in which each input bit moves half the
    output's.
    """
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _hashed(seed: int, *keys: Sequence[int]) -> np.ndarray:
    """64 bits (R,) for each seed and one entry of every key."""
    with np.errstate(over="ignore"):
        state = _mix(np.full(len(keys[0]), seed, dtype=np.uint64) + _GOLDEN)
        for key in keys:
            state = _mix(state ^ (np.asarray(key, dtype=np.uint64) * _GOLDEN + _GOLDEN))
    return state


def uniforms(seed: int, requests: Sequence[int], indices: Sequence[int]) -> Tensor:
    """One number in [0, 1) for each (seed, request, token index), float64 (R,)."""
    return torch.from_numpy((_hashed(seed, requests, indices) >> np.uint64(11)).astype(np.float64) / 2.0**53)


def request_seeds(seed: int, requests: Sequence[int]) -> list[int]:
    """A seed below 2^63 for each (seed, request), for samplers that draw a request's noise themselves."""
    return [int(state) for state in _hashed(seed, requests) >> np.uint64(1)]


def draw(logprob_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The tokens (R,) at which the cumulative distribution passes the uniform numbers: exact draws."""
    cumulative_RV = logprob_RV.double().exp().cumsum(-1)
    # Scaled by the last entry, which rounding leaves a little off 1, so that no number falls behind the end.
    goal_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, goal_R1, right=True).squeeze(1).clamp_(max=logprob_RV.shape[1] - 1)


def reshape_distribution(logprob_RV: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Log-probabilities at another temperature, cut to the smallest set of tokens that holds ``top_p``.

    For chat and serving only: training samples from the policy itself. A temperature of 0 puts everything on the
    likeliest token.
    """
    if temperature == 0.0:
        best_R1 = logprob_RV.argmax(-1, keepdim=True)
        return torch.full_like(logprob_RV, float("-inf")).scatter_(1, best_R1, 0.0)
    shaped_RV = torch.log_softmax(logprob_RV / temperature, dim=-1)
    if top_p >= 1.0:
        return shaped_RV
    ordered_RV, places_RV = shaped_RV.sort(dim=-1, descending=True)
    before_RV = ordered_RV.exp().cumsum(-1) - ordered_RV.exp()
    cut_RV = ordered_RV.masked_fill(before_RV >= top_p, float("-inf"))
    return torch.log_softmax(torch.empty_like(cut_RV).scatter_(1, places_RV, cut_RV), dim=-1)
