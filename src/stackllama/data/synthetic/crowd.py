"""The people of the embedded community: what they ask, how they answer, and how they vote.

Answers are right, wrong or evasive, with or without a reason or a second fact, polite, plain or rude, with or without
padding. Voters like what is good (the gold score, seen through noise), but they also like length; those who come early
see early answers only, and the accepted answer is shown first. So votes carry the biases of real sites; the constants
are set so that they come out as strong as measured there (docs/embedded-community.md has the numbers).

Time is in days since the site opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from stackllama.data.synthetic.gold import gold_score
from stackllama.data.synthetic.world import (
    ANY_TOPIC,
    CONTEXT,
    EVASIVE,
    FACTS,
    FILLER,
    HELD_OUT_NOUNS,
    PLANTS,
    POLITE,
    RUDE,
    TOPICS,
    Topic,
)

ANSWERS = ((1, 0.05), (2, 0.35), (3, 0.32), (4, 0.18), (5, 0.10))
"""How many answers a question gets, and how often."""
RIGHT, LATE = 0.5, 0.78
"""How often the first answer is right, and how much less often each later one is: those who know answer first."""
EVASIVE_OF_REST, ASTRAY_OF_REST = 0.15, 0.3
"""Of the answers that are not right, how many evade, and how many are about another topic or another plant."""
REASON_IF_RIGHT, REASON_IF_WRONG = 0.5, 0.35
"""How often a reason stands beside a right or a wrong value: those who know tell why."""
SECOND = 0.1
"""How often a second fact, of another topic, stands beside a value."""
OTHER_TOPIC = 0.8
"""Of the answers that are astray, how many are about another topic; the others are about another plant."""

DELAY, DELAY_SPREAD = 2.4, 2.0
"""Median days until an answer is written, and the deviation of their logarithm."""
FAST, FAST_DAYS, SLOW_DAYS = 0.7, 2.0, 200.0
"""Share of a question's visitors that come while it is new, and the mean days until a new or a late one comes."""

VOTES, VOTES_SPREAD = 0.8, 0.6
"""Median up-votes of an answer of taste 0 that is there from the start, and the deviation of their logarithm."""
DOWN = 0.03
TASTE, BEND = 4.0, 0.8
"""The logarithm of the votes moves by `TASTE` from gold 0 to gold 1; bent, since people tell bad from poor more easily
than good from perfect.
"""
LENGTH, READ = 0.07, 22
"""It also moves by `LENGTH` for each word up to `READ`: nobody reads on."""
NOISE = 0.35
"""Deviation of what all voters of an answer get wrong together, in the same logarithm."""
FIRST = 0.3
"""More up-votes, as a share, for the first answer."""

ACCEPTS, ACCEPT_NOISE = 0.65, 0.15
"""Share of askers who accept an answer, and how uncertain they are of how good each is."""
ACCEPTED = 1.6
"""More up-votes, as a share, for the accepted answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question: what it says, as HTML, and what it is about."""

    plant: str
    topic: Topic
    title: str
    body: str


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer's HTML, its text, and the gold score that voters see through noise."""

    body: str
    text: str
    gold: float


@dataclass(frozen=True, slots=True)
class Ballot:
    """The votes for one post: the days on which they were cast."""

    up: tuple[float, ...]
    down: tuple[float, ...]


def ask(rng: Random, *, held_out: bool) -> Asked:
    """A question about a random fact, in held-out wordings or in those of all other splits."""
    plant, topic = rng.choice(PLANTS), rng.choice(TOPICS)
    title, again = (one.format(p=plant) for one in rng.sample(_wordings(topic, held_out=held_out), 2))
    sentences = [again]
    if rng.random() < 0.45:
        sentences.insert(rng.randint(0, 1), rng.choice(CONTEXT))
    name = rng.random()
    if name < 0.04:  # now and then somebody marks the name up
        sentences = [one.replace(plant, f"<em>{plant}</em>") for one in sentences]
    elif name < 0.06:
        sentences = [one.replace(plant, f"<code>{plant}</code>") for one in sentences]
    return Asked(plant, topic, title, _html(rng, sentences))


def _wordings(topic: Topic, *, held_out: bool) -> list[str]:
    if held_out:
        return list(topic.held_out)
    nouns = topic.nouns[:-HELD_OUT_NOUNS]
    return [*topic.questions, *(frame.format(n=noun, p="{p}") for frame in ANY_TOPIC for noun in nouns)]


def answer(rng: Random, asked: Asked, *, place: int) -> Answered:
    """One person's answer; `place` counts the answers that were there before."""
    kind = rng.random()
    if rng.random() < RIGHT * LATE**place:
        core = _claims(rng, asked, right=True)
    elif kind < EVASIVE_OF_REST:
        core = [rng.choice(EVASIVE)]
    elif kind < EVASIVE_OF_REST + ASTRAY_OF_REST:
        core = _astray(rng, asked)
    else:
        core = _claims(rng, asked, right=False)
    padding = rng.choices((0, 1, 2), (0.55, 0.3, 0.15))[0]
    sentences = core + rng.sample(FILLER, padding)
    tone = rng.random()
    if tone < 0.3:
        remark = rng.choice(POLITE)
        sentences.insert(0 if POLITE.index(remark) < 3 else len(sentences), remark)
    elif tone < 0.45:
        sentences.insert(rng.choice((0, len(sentences))), rng.choice(RUDE))
    text = " ".join(sentences)
    title = asked.title
    listed = len(core) == 2 and len(sentences) == 2 and rng.random() < 0.25
    body = "<ul>\n" + "".join(f"<li>{one}</li>\n" for one in core) + "</ul>\n" if listed else _html(rng, sentences)
    return Answered(body, text, gold_score(title, text))


def _claims(rng: Random, asked: Asked, *, right: bool) -> list[str]:
    """One sentence that states a value, perhaps with its reason, and perhaps one with a second fact."""
    reasoned = REASON_IF_RIGHT if right else REASON_IF_WRONG
    first = _claim(rng, asked.plant, asked.topic, right=right, reason=rng.random() < reasoned, named=rng.random() < 0.6)
    if rng.random() >= SECOND:
        return [first]
    other = rng.choice([topic for topic in TOPICS if topic is not asked.topic])
    return [first, _claim(rng, asked.plant, other, right=rng.random() < 0.6, reason=False, named=False)]


def _astray(rng: Random, asked: Asked) -> list[str]:
    """A true sentence about another topic, or about another plant, by somebody who read the question badly."""
    plant, topic, named = asked.plant, asked.topic, rng.random() < 0.6
    if rng.random() < OTHER_TOPIC:
        topic = rng.choice([other for other in TOPICS if other is not topic])
    else:
        plant, named = rng.choice([other for other in PLANTS if other != plant]), True
    return [_claim(rng, plant, topic, right=True, reason=rng.random() < REASON_IF_WRONG, named=named)]


def _claim(rng: Random, plant: str, topic: Topic, *, right: bool, reason: bool, named: bool) -> str:
    value = FACTS[plant, topic.name]
    if not right:
        value = rng.choice([one for one in topic.reasons if one != value])
    it = f"{rng.choice(('the', 'your'))} {plant}" if named else "it"
    sentence = rng.choice(topic.answers).format(v=value, it=it, It=it.capitalize())
    return f"{sentence}, {topic.reasons[value]}." if reason else f"{sentence}."


def _html(rng: Random, sentences: Sequence[str]) -> str:
    """One paragraph, or sometimes two."""
    cut = rng.randint(1, len(sentences) - 1) if len(sentences) > 1 and rng.random() < 0.15 else 0
    parts = [sentences[:cut], sentences[cut:]] if cut else [sentences]
    return "\n\n".join(f"<p>{' '.join(part)}</p>" for part in parts) + "\n"


def answer_days(rng: Random, asked_at: float, *, until: float) -> list[float]:
    """When the answers to a question are written, in order."""
    count = rng.choices([many for many, _ in ANSWERS], [share for _, share in ANSWERS])[0]
    delays = [DELAY * math.exp(rng.gauss(0, DELAY_SPREAD)) for _ in range(count)]
    return sorted(min(asked_at + 0.003 + delay, until - rng.random()) for delay in delays)


def accept(rng: Random, answers: Sequence[Answered]) -> int | None:
    """Which answer the asker accepts: what seems best, if anything."""
    if rng.random() >= ACCEPTS:
        return None
    seen = [one.gold + rng.gauss(0, ACCEPT_NOISE) for one in answers]
    return seen.index(max(seen))


def vote(
    rng: Random, asked_at: float, days: Sequence[float], answers: Sequence[Answered], accepted: int | None, until: float
) -> list[Ballot]:
    """The votes for each answer to one question that was asked on `asked_at`, up to the day `until`."""
    visitors = VOTES * math.exp(rng.gauss(0, VOTES_SPREAD))
    ballots = []
    for place, (day, one) in enumerate(zip(days, answers, strict=True)):
        age = day - asked_at
        fast, slow = FAST * math.exp(-age / FAST_DAYS), (1 - FAST) * math.exp(-age / SLOW_DAYS)
        words = min(len(one.text.split()), READ)
        taste = TASTE * (one.gold**BEND - 0.35) + LENGTH * (words - 12) + rng.gauss(0, NOISE)
        shown = (fast + slow) * (1 + FIRST * (place == 0)) * (1 + ACCEPTED * (place == accepted))
        up = _poisson(rng, visitors * shown * math.exp(taste))
        down = _poisson(rng, visitors * (fast + slow) * DOWN * math.exp(-2 * taste))
        # Waiting times have no memory: whoever has not come yet comes as late after the answer as after the question.
        share = fast / (fast + slow)
        cast = [
            [day + rng.expovariate(1 / (FAST_DAYS if rng.random() < share else SLOW_DAYS)) for _ in range(many)]
            for many in (up, down)
        ]
        ballots.append(Ballot(*(tuple(sorted(when for when in side if when < until)) for side in cast)))
    return ballots


def vote_on_question(rng: Random, asked_at: float, until: float) -> Ballot:
    """The votes for a question itself, which say little about it."""
    days = [[asked_at + rng.expovariate(1 / 30) for _ in range(_poisson(rng, mean))] for mean in (2.5, 0.3)]
    return Ballot(*(tuple(sorted(when for when in side if when < until)) for side in days))


def _poisson(rng: Random, mean: float) -> int:
    """A Poisson number by Knuth's product, in pieces so that no product underflows. The same on every platform."""
    count = 0
    while mean > 0:
        piece = min(mean, 50.0)
        mean -= piece
        edge, product = math.exp(-piece), rng.random()
        while product > edge:
            count += 1
            product *= rng.random()
    return count
