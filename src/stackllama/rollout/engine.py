"""The sampler: prompts as token ids in, sampled token ids with their log-probabilities out.

Prompts are prefilled as one packed forest, each distinct prompt once however many samples it has; then every sequence
grows by a token a step. Finished sequences leave the batch. Requests beyond ``slots`` wait for the next wave.

Legend: R sequences in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stackllama.model.roles import Role
from stackllama.rollout.cache import SequenceCache
from stackllama.rollout.sampling import draw, reshape_distribution, uniforms
from stackllama.tokens.forest import Tree, plant

# The batch is packed together when this share of its rows has finished: each packing copies the cache.
COMPACT_AT = 0.25
SLOTS = 64
"""Sequences that grow at a time, unless it is said otherwise."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (token ids, ending in the template's last) and the number that keys its noise."""

    id: int
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Response:
    """Sampled ids, the EOS included when that is why it stopped, and each id's log-probability in nats under the
    sampler.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Training uses temperature 1 and top_p 1, which are the policy itself; others are for chat."""

    seed: int
    max_new_tokens: int
    eos_id: int
    slots: int = SLOTS
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(slots=True)
class _Growing:
    request: Request
    tokens: list[int]
    logprobs: list[float]


def sample(role: Role, requests: Sequence[Request], how: Sampling) -> list[Response]:
    """Sample every request, in order. Call inside an entered role, without gradients."""
    responses: dict[int, Response] = {}
    for start in range(0, len(requests), how.slots):
        wave = [_Growing(request, [], []) for request in requests[start : start + how.slots]]
        for at, growing in _grow(role, wave, how):
            if (stopped := _stopped(growing, how)) is not None:
                responses[start + at] = Response(tuple(growing.tokens), tuple(growing.logprobs), stopped)
    return [responses[at] for at in range(len(requests))]


def stream(role: Role, request: Request, how: Sampling) -> Iterator[int]:
    """The ids of one response as they are sampled, the EOS left out."""
    for _, growing in _grow(role, [_Growing(request, [], [])], how):
        if growing.tokens[-1] != how.eos_id:
            yield growing.tokens[-1]


def _stopped(growing: _Growing, how: Sampling) -> Literal["eos", "length"] | None:
    if growing.tokens[-1] == how.eos_id:
        return "eos"
    return "length" if len(growing.tokens) == how.max_new_tokens else None


def _grow(role: Role, wave: list[_Growing], how: Sampling) -> Iterator[tuple[int, _Growing]]:
    """Grow all sequences of a wave to their ends; yields (place in the wave, sequence) after each of its tokens."""
    with torch.no_grad():
        cache, hidden_RD = _prefill(role, wave, how)
    active = list(range(len(wave)))
    running = [True] * len(active)
    while True:
        with torch.no_grad():
            token_R = _next_tokens(role, [wave[at] for at in active], hidden_RD, how)
        for row, at in enumerate(active):
            if running[row]:
                yield at, wave[at]
                running[row] = _stopped(wave[at], how) is None
        if not any(running):
            return
        if running.count(False) >= COMPACT_AT * len(running):
            kept = [row for row, runs in enumerate(running) if runs]
            rows = torch.tensor(kept, device=token_R.device)
            cache.keep(rows)
            token_R = token_R[rows]
            active = [active[row] for row in kept]
            running = [True] * len(active)
        with torch.no_grad():
            hidden_RD = role.next_hidden(token_R, cache.lengths_R, cache)
            cache.grow()


def _prefill(role: Role, wave: Sequence[_Growing], how: Sampling) -> tuple[SequenceCache, Tensor]:
    """The filled cache, and the hidden state (R, D) at each prompt's last token."""
    distinct = {growing.request.prompt: None for growing in wave}
    forest = plant([Tree(prompt, (), key) for key, prompt in enumerate(distinct)])
    segment = dict(zip(distinct, forest.segments, strict=True))
    longest = max(map(len, distinct))
    segments = [segment[growing.request.prompt] for growing in wave]
    cache = SequenceCache(segments, places=longest + how.max_new_tokens, device=role.device)
    hidden_TD = role.hidden(forest, cache=cache)
    return cache, hidden_TD[torch.tensor([one.stop - 1 for one in segments], device=role.device)]


def _next_tokens(role: Role, growing: Sequence[_Growing], hidden_RD: Tensor, how: Sampling) -> Tensor:
    """Draw a token for each sequence and append it with its log-probability; finished rows draw too, and are not looked
    at.
    """
    logprob_RV = role.all_logprobs(hidden_RD)
    if how.temperature != 1.0 or how.top_p != 1.0:
        logprob_RV = reshape_distribution(logprob_RV, temperature=how.temperature, top_p=how.top_p)
    noise_R = uniforms(how.seed, [one.request.id for one in growing], [len(one.tokens) for one in growing])
    token_R = draw(logprob_RV, noise_R.to(logprob_RV.device))
    chosen_R = logprob_RV.gather(1, token_R[:, None]).squeeze(1)
    for one, token, logprob in zip(growing, token_R.tolist(), chosen_R.tolist(), strict=True):
        if _unfinished(one, how):
            one.tokens.append(token)
            one.logprobs.append(logprob)
    return token_R


def _unfinished(one: _Growing, how: Sampling) -> bool:
    return not one.tokens or _stopped(one, how) is None
