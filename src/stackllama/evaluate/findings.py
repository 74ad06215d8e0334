"""What an audit of a reward model comes to, in sentences: each says what was found, with its numbers, and no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stackllama.evaluate.audit import COIN, Audit, Baseline
from stackllama.evaluate.sensitivity import Reaction
from stackllama.evaluate.statistics import Interval

MOVED = 0.5
"""Standard deviations beyond which a change of scores is told."""


def findings(audit: Audit, reactions: Mapping[str, Reaction]) -> list[str]:
    """The sentences, the weightiest first."""
    return [
        _coin(audit.accuracy),
        *(_baseline(one) for one in audit.baselines),
        *_length(audit),
        *_calibration(audit),
        *_reactions(reactions),
    ]


def _coin(accuracy: Interval) -> str:
    said = f"It ranks {_percent(accuracy)} of held-out pairs as the community did"
    if accuracy.low > COIN:
        return f"{said}: better than a coin."
    if accuracy.high < COIN:
        return f"{said}: worse than a coin, so look for answers that were swapped."
    return f"{said}: not told apart from a coin."


def _baseline(one: Baseline) -> str:
    by = f"{100 * one.over.mean:+.1f} points [{100 * one.over.low:+.1f}, {100 * one.over.high:+.1f}]"
    rule = f"“{one.label}” ({100 * one.accuracy.mean:.1f}%)"
    if one.over.low > 0:
        return f"Better than {rule}: {by}."
    if one.over.high < 0:
        return f"Worse than {rule}: {by}."
    return f"Not told apart from {rule}: {by}."


def _length(audit: Audit) -> Iterator[str]:
    against, along = audit.against_length, audit.with_length
    if against is None:
        return
    said = f"Where the better answer is the shorter one it is right in {_percent(against)}"
    if against.high < COIN:
        yield f"{said}: it goes by length there, against the community."
    elif against.low > COIN and along is not None and along.low > COIN:
        yield f"{said}: what it knows is more than length."
    elif against.low > COIN and along is not None and along.high < COIN:
        yield f"{said}, and where it is the longer one in {_percent(along)}: it goes by length, for short answers."
    elif against.low > COIN:
        yield f"{said}: it does not follow length there."
    else:
        yield f"{said}: not told apart from a coin there."


def _calibration(audit: Audit) -> Iterator[str]:
    found = audit.calibration
    error = f"the expected calibration error is {100 * found.error:.1f} points"
    if found.temperature is None:
        yield f"How sure its margins are to be read cannot be told, as no temperature fits them; {error}."
        return
    fit = f"{found.temperature.mean:.2f} [{found.temperature.low:.2f}, {found.temperature.high:.2f}]"
    if found.temperature.low > 1:
        yield f"It is too sure of itself: its margins fit best divided by {fit}; {error}."
    elif found.temperature.high < 1:
        yield f"It is surer than it says: its margins fit best divided by {fit}; {error}."
    else:
        yield f"Its margins are not told apart from log-odds: they fit best divided by {fit}; {error}."


def _reactions(reactions: Mapping[str, Reaction]) -> Iterator[str]:
    for change, found in reactions.items():
        far = found.shift.low > MOVED or found.shift.high < -MOVED
        lost = found.accuracy.high < 0
        if far or lost:
            moved = f"{found.shift.mean:+.2f} deviations [{found.shift.low:+.2f}, {found.shift.high:+.2f}]"
            turned = f"{100 * (1 - found.kept.mean):.0f}% of the pairs turn over"
            accuracy = f"accuracy changes by {100 * found.accuracy.mean:+.1f} points"
            yield f"Answers {change} score {moved}; {turned}, {accuracy}."


def _percent(found: Interval) -> str:
    return f"{100 * found.mean:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"
