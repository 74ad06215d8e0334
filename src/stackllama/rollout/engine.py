"""The sampler: prompts as token ids in, sampled token ids with their log-probabilities out.

Every running sequence grows by a token a step. One that ends leaves at once, and a waiting request takes its slot
(continuous batching; Yu et al. 2022, "Orca"). Requests that come in together are prefilled as one packed forest, each
distinct prompt once however many samples it has.

Legend: R running sequences, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from stackllama.model.roles import Role
from stackllama.rollout.cache import SequenceCache
from stackllama.rollout.sampling import draw, reshape_distribution, uniforms
from stackllama.tokens.forest import Tree, plant

SLOTS = 64
"""Sequences that grow at a time, unless it is said otherwise."""
ADMIT_AT = 1 / 8
"""Share of the slots that is free before waiting requests come in: a prefill for each would cost more than it gains."""

Stopped = Literal["eos", "length"]


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
    stopped: Stopped


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Training uses temperature 1 and top_p 1, which are the policy itself; others are for chat."""

    seed: int
    max_new_tokens: int
    eos_id: int
    slots: int = SLOTS
    temperature: float = 1.0
    top_p: float = 1.0


class Sampler(Protocol):
    """What samples for training: `sample` below, or another program with the same weights (`vllm.py`)."""

    def __call__(self, role: Role, requests: Sequence[Request], how: Sampling, /) -> list[Response]:
        """Sample every request, in order, from the role that was entered."""


@dataclass(eq=False, slots=True)
class Growing:
    """A request on its way: what was sampled so far, and why it stopped, or None."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: Stopped | None = None


class Engine:
    """Grows requests inside an entered role, without gradients. slots: sequences that run at a time; longest: tokens of
    the longest prompt that may come.
    """

    def __init__(self, role: Role, how: Sampling, *, slots: int, longest: int) -> None:
        self._role, self._how, self._slots = role, how, slots
        self._cache = SequenceCache(slots, places=longest + how.max_new_tokens, device=role.device)
        self._waiting: deque[Growing] = deque()
        self._running: list[Growing] = []
        self._hidden_RD: Tensor | None = None

    def submit(self, request: Request) -> Growing:
        """Queue a request; it runs as soon as a slot is free."""
        sequence = Growing(request)
        self._waiting.append(sequence)
        return sequence

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._waiting and not self._running

    @torch.no_grad()
    def step(self) -> list[Growing]:
        """Let waiting requests in, and grow every running sequence by a token; gives those that grew."""
        self._admit()
        assert self._hidden_RD is not None, "a step with no sequence"
        token_R = self._draw(self._hidden_RD)
        grown = list(self._running)
        for row in reversed(range(len(grown))):
            if grown[row].stopped is not None:
                token_R = self._leave(row, token_R)
        self._hidden_RD = None
        if self._running:
            self._hidden_RD = self._role.next_hidden(token_R, self._cache.lengths_R, self._cache)
            self._cache.grow()
        return grown

    def _admit(self) -> None:
        """Prefill waiting requests, where enough slots are free."""
        free = self._slots - len(self._running)
        if not self._waiting or free < min(len(self._waiting), max(1, int(self._slots * ADMIT_AT))):
            return
        new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        distinct = {one.request.prompt: None for one in new}
        forest = plant([Tree(prompt, (), key) for key, prompt in enumerate(distinct)])
        segment_of = dict(zip(distinct, forest.segments, strict=True))
        segments = [segment_of[one.request.prompt] for one in new]
        self._cache.expect(segments)
        hidden_TD = self._role.hidden(forest, cache=self._cache)
        self._cache.arrive()
        last_R = torch.tensor([one.stop - 1 for one in segments]).to(self._role.device, non_blocking=True)
        running = [] if self._hidden_RD is None else [self._hidden_RD]
        self._hidden_RD = torch.cat([*running, hidden_TD[last_R]])
        self._running += new

    def _draw(self, hidden_RD: Tensor) -> Tensor:
        """Draw a token for each running sequence and append it with its log-probability."""
        how = self._how
        logprob_RV = self._role.all_logprobs(hidden_RD)
        if how.temperature != 1.0 or how.top_p != 1.0:
            logprob_RV = reshape_distribution(logprob_RV, temperature=how.temperature, top_p=how.top_p)
        noise_R = uniforms(
            how.seed, [one.request.id for one in self._running], [len(one.tokens) for one in self._running]
        )
        token_R = draw(logprob_RV, noise_R.to(logprob_RV.device))
        chosen_R = logprob_RV.gather(1, token_R[:, None]).squeeze(1)
        for one, token, logprob in zip(self._running, token_R.tolist(), chosen_R.tolist(), strict=True):
            one.tokens.append(token)
            one.logprobs.append(logprob)
            if token == how.eos_id:
                one.stopped = "eos"
            elif len(one.tokens) == how.max_new_tokens:
                one.stopped = "length"
        return token_R

    def _leave(self, row: int, token_R: Tensor) -> Tensor:
        """Free a row; the last running sequence moves there, and its token with it."""
        self._cache.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()
        token_R[row] = token_R[-1]
        return token_R[:-1]


def sample(role: Role, requests: Sequence[Request], how: Sampling) -> list[Response]:
    """Sample every request, in order. Call inside an entered role."""
    longest = max((len(one.prompt) for one in requests), default=0)
    engine = Engine(role, how, slots=min(how.slots, len(requests)), longest=longest)
    sequences = [engine.submit(request) for request in requests]
    while not engine.is_idle:
        engine.step()
    return [Response(tuple(one.tokens), tuple(one.logprobs), one.stopped or "length") for one in sequences]


def stream(role: Role, request: Request, how: Sampling) -> Iterator[int]:
    """The ids of one response as they are sampled, the EOS left out."""
    engine = Engine(role, how, slots=1, longest=len(request.prompt))
    sequence = engine.submit(request)
    while not engine.is_idle:
        engine.step()
        if sequence.tokens[-1] != how.eos_id:
            yield sequence.tokens[-1]
