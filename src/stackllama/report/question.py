"""One question for a terminal: its texts as they are, whom to name for each, and its pairs."""

from __future__ import annotations

from collections.abc import Iterator

from stackllama.data.posts import Attribution, Pair, Question
from stackllama.data.store.picking import Picked


def lines(picked: Picked) -> Iterator[str]:
    """The lines of a question with its answers (by their places, from 1) and its pairs."""
    question = picked.question
    yield f"{question.title}\n" if question.title else ""
    yield f"question {question.id} of {question.site}: votes {question.votes:,}, {day(question.date)}"
    yield from _by(question.attribution)
    yield f"tags: {', '.join(question.tags) or 'none'}"
    yield f"split {picked.split}, cluster {question.cluster or 'not looked for'}, weight {question.weight:g}"
    yield f"\n{question.text}"
    for place, answer in enumerate(question.answers, 1):
        mark = ", accepted" if answer.accepted else ""
        yield f"\n--- {place}. answer {answer.id}: votes {answer.votes:,}{mark}, {day(answer.date)}"
        yield from _by(answer.attribution)
        yield f"\n{answer.text}"
    yield f"\n--- pairs, better > worse: {len(question.pairs) or 'none'}"
    for pair in question.pairs:
        yield f"  {pair.better + 1} > {pair.worse + 1}   {difference(pair)}"


def day(date: str) -> str:
    """The day of a moment, "no date" where there is none."""
    return date[:10] or "no date"


def difference(pair: Pair) -> str:
    """By what the one answer of a pair is better."""
    margin = f", margin {pair.margin:g}" if pair.margin else ""
    return f"score gap {pair.gap}{margin}"


def marks(question: Question, place: int) -> Iterator[str]:
    """What the pairs say of an answer: "better than 2 (score gap 1)", with places from 1."""
    for pair in question.pairs:
        if pair.better == place:
            yield f"better than {pair.worse + 1} ({difference(pair)})"
        elif pair.worse == place:
            yield f"worse than {pair.better + 1} ({difference(pair)})"


def _by(given: Attribution) -> Iterator[str]:
    profile = f" ({given.profile_url})" if given.profile_url else ""
    yield f"by {given.author}{profile}, {given.license}"
    yield given.url or "no address"
