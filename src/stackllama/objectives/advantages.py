"""Advantages: how much better than expected each sampled token turned out. Pure tensor functions.

`gae` expects what a value head says. The others know no values: they look at a response's reward as a whole (all of its
tokens' rewards together, so the KL charged at each counts too), compare it with those of other responses, and give each
of its tokens the same advantage. From which responses an expectation is taken is all that tells them apart:

    rloo, grpo   the prompt's other samples, all of the prompt's samples (in deviations)
    reinforce    all other responses of the batch, whatever their prompts

`best` expects nothing: it has the best of a prompt's samples learned, and the others left alone (rejection sampling).

Left out on purpose: Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-like training"), which is `grpo` without its
division, and so `rloo` times (k - 1) / k for k samples of each prompt.

N: response tokens of the batch. S: responses. T: tokens of the longest response (see `masked.py` for the layout).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stackllama.objectives.masked import columns, sum_per_sequence, to_matrix

SMALLEST_GROUP_DEVIATION = 1e-4
"""Added to the deviation of a prompt's rewards, as trl does: what differs by less differs by rounding."""


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


@torch.no_grad()
def rloo(rewards_N: Tensor, sequence_N: Tensor, prompt_S: Tensor) -> Tensor:
    """Give each token its response's reward minus the mean reward of the prompt's other responses (leave one out).

    That expectation does not hang on the response itself, so the policy gradient stays unbiased.

    rewards_N: float32 or float64 (N), KL and score; sequence_N: int64 (N), in 0..S-1, each response contiguous and in
    order; prompt_S: int64 (S), equal for responses to one prompt, in any order. Returns rewards_N's dtype (N), in units
    of reward, without gradient. Raises ValueError for a prompt with fewer than 2 responses, other dtypes, or shapes
    that do not fit. Source: Ahmadian et al. 2024, "Back to basics: revisiting REINFORCE style optimization for learning
    from human feedback in LLMs", on RLOO; Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """
    reward_S = _whole_rewards(rewards_N, sequence_N, prompt_S)
    return _over_the_others(reward_S, prompt_S, "rloo", "a prompt").to(rewards_N.dtype)[sequence_N]


@torch.no_grad()
def grpo(rewards_N: Tensor, sequence_N: Tensor, prompt_S: Tensor) -> Tensor:
    """Give each token its response's reward minus the mean of all of the prompt's responses, in their deviations.

    Arguments, errors and result as for `rloo`, the result without unit. The deviation is that of the population
    (divided by k, not k - 1), as in `whiten`; equal rewards give 0. Source: Shao et al. 2024, "DeepSeekMath", section
    4.1.2 (outcome supervision).
    """
    reward_S = _whole_rewards(rewards_N, sequence_N, prompt_S)
    centred_S, count_S = _centred(reward_S, prompt_S)
    _require_two(count_S, "grpo", "a prompt")
    deviation_S = (_sum_over_group(centred_S.square(), prompt_S) / count_S).sqrt()
    return (centred_S / (deviation_S + SMALLEST_GROUP_DEVIATION)).to(rewards_N.dtype)[sequence_N]


@torch.no_grad()
def reinforce(rewards_N: Tensor, sequence_N: Tensor, prompt_S: Tensor) -> Tensor:
    """Give each token its response's reward minus the mean reward of all other responses of the batch.

    Arguments, errors and result as for `rloo`, but which prompt a response belongs to does not matter, and it is the
    batch that needs 2 responses. Source: Williams 1992, "Simple statistical gradient-following algorithms for
    connectionist reinforcement learning", for REINFORCE with a baseline; the baseline of all others, which stays
    unbiased where that of all does not, as Kool et al. 2019 take it over one prompt's.
    """
    reward_S = _whole_rewards(rewards_N, sequence_N, prompt_S)
    batch_S = torch.zeros_like(prompt_S)
    return _over_the_others(reward_S, batch_S, "reinforce", "a batch").to(rewards_N.dtype)[sequence_N]


@torch.no_grad()
def best(rewards_N: Tensor, sequence_N: Tensor, prompt_S: Tensor) -> Tensor:
    """Give each token 1 where its response has the highest reward of its prompt's, and 0 elsewhere.

    Responses that share the highest reward share the 1, so that each prompt counts the same. At a ratio of 1 the
    gradient is that of fine-tuning on the best of a prompt's samples, each token weighing the same.

    Arguments, errors and result as for `rloo`, the result without unit. Source: Dong et al. 2023, "RAFT: reward ranked
    finetuning for generative foundation model alignment", algorithm 1; the policy-gradient form is ours.
    """
    reward_S = _whole_rewards(rewards_N, sequence_N, prompt_S)
    groups, place_S = prompt_S.unique(return_inverse=True)
    lowest_G = reward_S.new_full((len(groups),), -torch.inf)
    highest_G = lowest_G.scatter_reduce(0, place_S, reward_S, "amax")
    _require_two(_sum_over_group(torch.ones_like(reward_S), prompt_S), "best", "a prompt")
    is_best_S = (reward_S == highest_G[place_S]).double()
    return (is_best_S / _sum_over_group(is_best_S, prompt_S)).to(rewards_N.dtype)[sequence_N]


Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rewards_N, sequence_N, prompt_S) -> advantages_N, as `rloo` has them."""
WITHOUT_VALUES: Mapping[str, Estimate] = {"rloo": rloo, "grpo": grpo, "reinforce": reinforce, "best": best}


def _whole_rewards(rewards_N: Tensor, sequence_N: Tensor, prompt_S: Tensor) -> Tensor:
    """Reward of each response (S,), float64."""
    if rewards_N.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rewards are {rewards_N.dtype}: give them as float32 or float64")
    if prompt_S.ndim != 1:
        raise ValueError(f"prompt_S has shape {tuple(prompt_S.shape)}: give one prompt for each response")
    return sum_per_sequence(rewards_N.double(), sequence_N, len(prompt_S))


def _over_the_others(reward_S: Tensor, group_S: Tensor, name: str, group: str) -> Tensor:
    """Reward minus the mean of the group's others (S,): k / (k - 1) times what it is over the mean of all k."""
    centred_S, count_S = _centred(reward_S, group_S)
    _require_two(count_S, name, group)
    return centred_S * count_S / (count_S - 1)


def _centred(reward_S: Tensor, group_S: Tensor) -> tuple[Tensor, Tensor]:
    """Reward minus the mean of its group, and the group's responses, both float64 (S,)."""
    count_S = _sum_over_group(torch.ones_like(reward_S), group_S)
    return reward_S - _sum_over_group(reward_S, group_S) / count_S, count_S


def _sum_over_group(x_S: Tensor, group_S: Tensor) -> Tensor:
    """Sum over the responses of the same group, at each of them (S,)."""
    groups, place_S = group_S.unique(return_inverse=True)
    order_S = place_S.argsort(stable=True)
    return sum_per_sequence(x_S[order_S], place_S[order_S], len(groups))[place_S]


def _require_two(count_S: Tensor, name: str, group: str) -> None:
    if bool((count_S < 2).any()):
        raise ValueError(f"{group} has 1 response, {name} compares 2 at least: sample more of them")
