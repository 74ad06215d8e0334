"""Answers side by side on a page, and which of them a reader may want to see alone.

The choice is made in the browser by radio buttons and style rules: the page has no script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stackllama.report.layout import clipped, is_web
from stackllama.report.reading import number
from stackllama.report.verdict import show

PAGE_LIMIT = 300_000
"""Characters of all samples together: the rest stays in `evaluate/samples.json`, and the page says so."""
LONGER = 1.5
"""Times as many characters as the SFT model's answer from which an answer counts as much longer."""

_ENDS = {"eos": "ended by itself", "length": "cut at the length limit"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One role's answer; scores: (name, number as shown)."""

    label: str
    role: str
    text: str
    scores: Sequence[tuple[str, str]]
    end: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A question with the answers of all. link: whether one may be made of `url`; kinds: keys of the `Choice`s that it
    falls under.
    """

    question: str
    url: str
    link: bool
    answers: Sequence[Answer]
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Choice:
    """A radio button: the samples of one kind, and how many there are."""

    key: str
    label: str
    count: int


Given = Mapping[str, Any]


def _judged(sft: Given, policy: Given, name: str) -> float | None:
    """What the policy's answer scores more than the SFT model's."""
    mine, theirs = number(policy, name), number(sft, name)
    return None if mine is None or theirs is None else mine - theirs


def _disagree(sft: Given, policy: Given) -> bool:
    reward, judge = _judged(sft, policy, "reward"), _judged(sft, policy, "judge")
    return reward is not None and judge is not None and reward * judge < 0


def _longer(sft: Given, policy: Given) -> bool:
    before, after = (one.get("text") for one in (sft, policy))
    return isinstance(before, str) and isinstance(after, str) and len(after) > LONGER * len(before)


_KINDS: Mapping[str, tuple[str, Callable[[Given, Given], bool]]] = {
    "won": ("judge prefers {method}", lambda sft, policy: (_judged(sft, policy, "judge") or 0) > 0),
    "lost": ("judge prefers SFT", lambda sft, policy: (_judged(sft, policy, "judge") or 0) < 0),
    "disputed": ("reward model and judge disagree", _disagree),
    "fell": ("gold fell", lambda sft, policy: (_judged(sft, policy, "gold") or 0) < 0),
    "longer": ("{method} much longer", _longer),
    "cut": ("{method} cut off", lambda _, policy: policy.get("stopped") == "length"),
}


def samples(given: Sequence[Given], roles: Sequence[tuple[str, str]]) -> list[Sample]:
    """The samples that fit on a page, at least one; roles: (name in the file, label) in the order of columns."""
    shown: list[Sample] = []
    room = PAGE_LIMIT
    for one in (_sample(each, roles) for each in given):
        room -= len(one.question) + sum(len(answer.text) for answer in one.answers)
        if room < 0 and shown:
            break
        shown.append(one)
    return shown


def choices(shown: Sequence[Sample], method: str) -> list[Choice]:
    """The kinds that part the samples: some are of it, and some are not."""
    counted = [
        Choice(key, label.format(method=method), sum(key in one.kinds for one in shown))
        for key, (label, _) in _KINDS.items()
    ]
    return [one for one in counted if 0 < one.count < len(shown)]


def _sample(given: Given, roles: Sequence[tuple[str, str]]) -> Sample:
    """A link is made of `url` only where it is plain http or https."""
    url, answers = given.get("url"), given.get("answers")
    url = url if isinstance(url, str) else ""
    listed = [a for a in answers if isinstance(a, Mapping)] if isinstance(answers, list) else []
    by_role = {role: a for a in listed if isinstance(role := a.get("role"), str)}
    sft, policy = by_role.get("sft"), by_role.get("ppo")
    kinds = () if sft is None or policy is None else (key for key, (_, is_so) in _KINDS.items() if is_so(sft, policy))
    found = [_answer(role, label, by_role[role]) for role, label in roles if role in by_role]
    return Sample(_text(given.get("question")), url, is_web(url), found, frozenset(kinds))


def _answer(role: str, label: str, given: Given) -> Answer:
    scores = [(key, show(value)) for key in ("reward", "judge", "gold") if (value := number(given, key)) is not None]
    return Answer(label, role, _text(given.get("text")), scores, _ENDS.get(str(given.get("stopped")), ""))


def _text(value: Any) -> str:
    text, cut = clipped(value if isinstance(value, str) else "")
    return f"{text}\n[… {cut:,} more characters are not shown]" if cut else text
