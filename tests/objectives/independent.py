"""PPO once more, by one who knows the papers and not this package: separate sequences, padded, in float64.

Nothing of `stackllama` is imported here. The model is transformers' own (eager attention), an adapter is W + alpha /
rank * B A put in the place of W, and each number is worked out one response and one token at a time, as the papers'
sums have them. It is slow, and made to be compared with.

S: responses. L: tokens of the longest prompt with its response. T: tokens of one response.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

Weights = Mapping[str, Tensor]
"""Of a role, by name: `LAYER.lora_A.weight`, `LAYER.lora_B.weight`, `head.NAME.weight`, `head.NAME.bias`."""
PAD = 0


@dataclass(frozen=True)
class Sample:
    """A prompt and what was sampled to it."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """What a role says of one response, token by token (T,): log-probability, entropy, and the head's number at the
    place that predicts the token; the head's number at the last token itself.
    """

    logprob_T: Tensor
    entropy_T: Tensor
    head_T: Tensor | None
    head_at_end: Tensor | None


@dataclass(frozen=True)
class Terms:
    """A PPO variant: charge is where the KL is charged, estimator which one; own_value: whether values come from
    weights of their own, and not from a head on the policy.
    """

    advantage: str = "gae"
    charge: str = "reward"
    estimator: str = "k1"
    price: float = 0.2
    whiten: bool = True
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    entropy_bonus: float = 0.0
    missing_eos_penalty: float = 1.0
    own_value: bool = False


@dataclass(frozen=True)
class Old:
    """What is known of a response when it has been sampled: all (T,), constants of the loss."""

    logprob_T: Tensor
    reference_T: Tensor
    value_T: Tensor | None
    advantage_T: Tensor
    return_T: Tensor | None


def read(
    model: PreTrainedModel, weights: Weights | None, samples: Sequence[Sample], *, scale: float, head: str | None
) -> list[Reading]:
    """Read every response under a role's weights, or under none; scale: alpha / rank (Hu et al. 2021, section 4.1)."""
    whole = [[*one.prompt, *one.response] for one in samples]
    longest = max(map(len, whole))
    ids_SL = torch.tensor([[*one, *[PAD] * (longest - len(one))] for one in whole])
    seen_SL = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in whole])
    output = functional_call(
        model,
        {} if weights is None else _adapted(model, weights, scale),
        kwargs={"input_ids": ids_SL, "attention_mask": seen_SL, "output_hidden_states": True, "use_cache": False},
    )
    found = []
    for row, one in enumerate(samples):
        first, stop = len(one.prompt), len(one.prompt) + len(one.response)
        logits_TV, hidden_LD = output.logits[row, first - 1 : stop - 1], output.hidden_states[-1][row]
        probability_TV = torch.softmax(logits_TV, -1)
        logprob_TV = torch.log(probability_TV)
        numbers_L = None
        if weights is not None and head is not None:
            numbers_L = hidden_LD @ weights[f"head.{head}.weight"] + weights[f"head.{head}.bias"]
        found.append(
            Reading(
                torch.stack([logprob_TV[at, token] for at, token in enumerate(one.response)]),
                -(probability_TV * logprob_TV).sum(-1),
                None if numbers_L is None else numbers_L[first - 1 : stop - 1],
                None if numbers_L is None else numbers_L[stop - 1],
            )
        )
    return found


def _adapted(model: PreTrainedModel, weights: Weights, scale: float) -> dict[str, Tensor]:
    layers = sorted({name.partition(".lora_")[0] for name in weights if ".lora_" in name})
    own = dict(model.named_parameters())
    return {
        f"{layer}.weight": own[f"{layer}.weight"]
        + scale * weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
        for layer in layers
    }


def token_kl(policy: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Of each token, from log-probabilities (Schulman 2020, "Approximating KL divergence")."""
    ratio = torch.exp(reference - policy)
    return {"k1": -torch.log(ratio), "k2": torch.log(ratio) ** 2 / 2, "k3": ratio - 1 - torch.log(ratio)}[estimator]


def generalized_advantages(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """Sums of discounted TD errors (Schulman et al. 2016, eq. 16), written out as sums."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * later - value for r, later, value in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** far * error for far, error in enumerate(delta[at:])) for at in range(len(delta))]


def whole_advantages(name: str, earned: Sequence[float], prompts: Sequence[tuple[int, ...]]) -> list[float]:
    """One advantage for each response: RLOO (Ahmadian et al. 2024), GRPO (Shao et al. 2024), REINFORCE against all
    others of the batch, or the best of a prompt's samples alone.
    """
    found = []
    for at, mine in enumerate(earned):
        group = [one for one, prompt in zip(earned, prompts, strict=True) if prompt == prompts[at]]
        if name == "best":  # Dong et al. 2023, algorithm 1
            found.append(1.0 if mine == max(group) else 0.0)
            continue
        if name == "grpo":
            found.append((mine - statistics.fmean(group)) / (statistics.pstdev(group) + 1e-4))
            continue
        others = list(group if name == "rloo" else earned)
        others.remove(mine)
        found.append(mine - statistics.fmean(others))
    return found


def experience(
    samples: Sequence[Sample],
    policy: Sequence[Reading],
    reference: Sequence[Reading],
    scores: Sequence[float],
    terms: Terms,
    *,
    eos: int,
) -> list[Old]:
    """Rewards (Ziegler et al. 2019, eq. 2), then advantages and returns, of all responses of a batch."""
    rewards = []
    for one, now, before, score in zip(samples, policy, reference, scores, strict=True):
        price = terms.price if terms.charge == "reward" else 0.0
        each = (-price * token_kl(now.logprob_T, before.logprob_T, terms.estimator)).tolist()
        each[-1] += score - (terms.missing_eos_penalty if one.response[-1] != eos else 0.0)
        rewards.append(each)
    values = [None if now.head_T is None else now.head_T.tolist() for now in policy]
    advantages: list[list[float]]
    if terms.advantage == "gae":
        advantages = [
            generalized_advantages(each, value or [], terms.gamma, terms.lam)
            for each, value in zip(rewards, values, strict=True)
        ]
    else:
        whole = whole_advantages(
            terms.advantage, [math.fsum(each) for each in rewards], [one.prompt for one in samples]
        )
        advantages = [[number] * len(each) for number, each in zip(whole, rewards, strict=True)]
    returns = [
        None if value is None else [a + v for a, v in zip(each, value, strict=True)]
        for each, value in zip(advantages, values, strict=True)
    ]
    if terms.whiten:
        every = [number for each in advantages for number in each]
        mean, deviation = statistics.fmean(every), statistics.pstdev(every)
        advantages = [[(number - mean) / deviation for number in each] for each in advantages]

    def tensor(numbers: Sequence[float] | None) -> Tensor | None:
        return None if numbers is None else torch.tensor(numbers, dtype=torch.float64)

    return [
        Old(now.logprob_T, before.logprob_T, tensor(value), torch.tensor(each, dtype=torch.float64), tensor(end))
        for now, before, value, each, end in zip(policy, reference, values, advantages, returns, strict=True)
    ]


def loss(now: Sequence[Reading], old: Sequence[Old], terms: Terms) -> Tensor:
    """Mean over all tokens of a minibatch (Schulman et al. 2017, eq. 7 and 9), which is minimized."""
    every = [_token_losses(one, before, terms) for one, before in zip(now, old, strict=True)]
    return torch.cat(every).mean()


def _token_losses(now: Reading, old: Old, terms: Terms) -> Tensor:
    found = []
    for at, advantage in enumerate(old.advantage_T):
        ratio = torch.exp(now.logprob_T[at]) / torch.exp(old.logprob_T[at])
        inside = torch.clamp(ratio, 1 - terms.clip, 1 + terms.clip)
        total = -torch.minimum(ratio * advantage, inside * advantage)
        total = total - terms.entropy_bonus * now.entropy_T[at]
        if terms.charge == "loss":
            total = total + terms.price * token_kl(now.logprob_T[at], old.reference_T[at], terms.estimator)
        if now.head_T is not None and old.value_T is not None and old.return_T is not None:
            value, before, target = now.head_T[at], old.value_T[at], old.return_T[at]
            near = torch.clamp(value, before - terms.value_clip, before + terms.value_clip)
            total = total + terms.value_coefficient * torch.maximum((value - target) ** 2, (near - target) ** 2) / 2
        found.append(total)
    return torch.stack(found)
