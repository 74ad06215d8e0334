"""The comparisons of an exam's answers as requests to a judge, and the replies as what was said.

A comparison is two requests, one for each order. Where a reply cannot be read a third or fourth follows, which asks
again; where that is not read either, the comparison is left out, and counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllama.errors import RunError
from stackllama.evaluate import verdicts
from stackllama.evaluate.asking import Request
from stackllama.evaluate.pairwise import SCORES, Compared
from stackllama.evaluate.replies import Replies, Reply
from stackllama.files import digest_json, read_json

SFT = "sft"
POLICIES = ("ppo", "best_of")
"""Whose answers are compared with the SFT model's: the policy's, whatever trained it, and best-of-n's."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of the exam, with its scores under the names of SCORES, as far as there are."""

    text: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """A question of the exam, with its answers by role."""

    question: str
    answers: Mapping[str, Answer]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A policy's answer beside the SFT model's: what is asked with the policy's first, and with it second."""

    policy: str
    mine: Answer
    other: Answer
    straight: Request
    swapped: Request

    @property
    def equal(self) -> bool:
        """Whether both wrote the same, so that there is nothing to ask."""
        return self.mine.text == self.other.text

    @property
    def requests(self) -> tuple[Request, ...]:
        """What is to be asked."""
        return () if self.equal else (self.straight, self.swapped)


def read_samples(path: Path, folder: Path) -> list[Sample]:
    """The questions of an exam with their answers. Errors: RunError where there are none, or something else."""
    if not path.is_file():
        raise RunError(
            f"{path} is not there: {folder} has no exam; first type: stackllama evaluate {folder}/recipe.yaml"
        )
    found = read_json(path)
    try:
        return [Sample(_text(one["question"]), {_text(a["role"]): _answer(a) for a in one["answers"]}) for one in found]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{path} does not hold questions with answers ({error}); evaluate the run again") from error


def _answer(found: Mapping[str, Any]) -> Answer:
    scores = {name: _score(name, found[name]) for name in SCORES if found.get(name) is not None}
    return Answer(_text(found["text"]), scores)


def _score(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # whole numbers may be larger
        raise ValueError(f"{name} is no finite number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} stands where a text should")
    return value


def compare(
    samples: Sequence[Sample], *, address: str, model: str, parameters: Mapping[str, Any], system: str
) -> Iterator[Comparison]:
    """Each policy's answer beside the SFT model's, where there are both. parameters: of the requests, beside model and
    messages.
    """

    def request(at: int, question: str, policy: str, first: str, second: str) -> Request:
        answers = samples[at].answers
        asked = verdicts.messages(question, answers[first].text, answers[second].text, system=system)
        body = {"model": model, "messages": asked, **parameters}
        return Request(_key(address, body), body, {"question": at, "policy": policy, "first": first})

    for at, sample in enumerate(samples):
        for policy in POLICIES:
            if {policy, SFT} <= set(sample.answers):
                yield Comparison(
                    policy,
                    mine=sample.answers[policy],
                    other=sample.answers[SFT],
                    straight=request(at, sample.question, policy, policy, SFT),
                    swapped=request(at, sample.question, policy, SFT, policy),
                )


def _key(address: str, body: Mapping[str, Any]) -> str:
    return digest_json({"url": address, "request": body})


def again(address: str, request: Request) -> Request:
    """What is asked where the reply to a request could not be read."""
    body = {**request.body, "messages": verdicts.asked_again(request.body["messages"])}
    return Request(_key(address, body), body, request.about, again=True)


def steps(comparisons: Sequence[Comparison], replies: Replies, address: str) -> list[tuple[Request, Reply | None]]:
    """Everything that has been asked or is to be, once each, with the reply that there is: each request, and where its
    reply cannot be read the second try.
    """
    found: dict[str, tuple[Request, Reply | None]] = {}
    for request in (request for one in comparisons for request in one.requests):
        reply = replies.get(request.key)
        found[request.key] = (request, reply)
        if reply is not None and read(reply) is None:
            second = again(address, request)
            found[second.key] = (second, replies.get(second.key))
    return list(found.values())


def read(reply: Reply) -> str | None:
    """The verdict of a reply, None where it has none."""
    return verdicts.verdict(reply.reply, cut=reply.cut)


def outcomes(
    comparisons: Sequence[Comparison], replies: Replies, address: str
) -> tuple[dict[str, list[Compared]], int]:
    """(what was said, by policy; how many comparisons lack a reply, and are left out)."""
    found: dict[str, list[Compared]] = {}
    unasked = 0
    for one in comparisons:
        said = [_outcome(request, replies, address) for request in one.requests]
        if any(not settled for settled, _ in said):
            unasked += 1
            continue
        straight, swapped = (verdict for _, verdict in said) if said else (None, None)
        scores = {
            name: one.mine.scores[name] - score for name, score in one.other.scores.items() if name in one.mine.scores
        }
        longer = len(one.mine.text) - len(one.other.text)
        compared = Compared(straight, swapped, equal=one.equal, longer=longer, scores=scores)
        found.setdefault(one.policy, []).append(compared)
    return found, unasked


def _outcome(request: Request, replies: Replies, address: str) -> tuple[bool, str | None]:
    """Whether a request is settled, and its verdict: the first reply's, else the second try's, else None."""
    reply = replies.get(request.key)
    if reply is not None and read(reply) is None:
        reply = replies.get(again(address, request).key)
    return reply is not None, None if reply is None else read(reply)
