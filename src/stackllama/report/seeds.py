"""Rivals over several seeds: what each seed gave, their mean with its interval, and how two rivals differ seed by seed.

A seed is a whole journey: its own data, SFT model, reward model and judge. What an exam's interval does not hold, how
another seed would have done, is what these hold; they rest on as many numbers as there are seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from stackllama.evaluate.statistics import CONFIDENCE, Interval, over_seeds
from stackllama.files import digest_json
from stackllama.report.comparison import rows, rows_at
from stackllama.report.reading import number, policy_stage
from stackllama.report.rivals import Group, Rival, several_seeds
from stackllama.report.tables import Table
from stackllama.report.verdict import DASH, show


@dataclass(frozen=True, slots=True)
class Kind:
    """A rival, whatever its seed. values: seed -> its row of numbers."""

    label: str
    rows: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Measure:
    """What is told of each seed: a key of the rows, its title, how its numbers are written; least and most: what it can
    be, so that no interval is shown beyond.
    """

    key: str
    title: str
    digits: int | None
    signed: bool = False
    least: float = -math.inf
    most: float = math.inf


MEASURES = (
    Measure("gold_difference", "Gold over SFT", 3, signed=True),
    Measure("win_rate", "The judge's win rate over SFT", None, least=0.0, most=1.0),
    Measure("kl", "KL, nats", 2),
)
AT_KL = (
    Measure("gold_gain", "gold gain", 2, signed=True),
    Measure("judge_gain", "judge gain", 2, signed=True),
)


def kinds(groups: Sequence[Group], told: Callable[[Group], Sequence[Mapping[str, Any]]] = rows) -> list[Kind]:
    """The rivals by what they are, each with its row under each seed, in the order of rows. told: rows of a group.

    Two runs of a group that are alike are told apart by their names, so they pool with nothing.
    """
    settings = _settings(groups)
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for group in groups:
        seed = group.rivals[0].seed
        by_name = {rival.name: rival for rival in group.rivals}
        for row in told(group):
            rival = by_name.get(row["name"])
            label = row["name"] if rival is None else settings[rival.name]
            found.setdefault(label, {})[seed] = row
    return [Kind(label, seeds) for label, seeds in found.items() if label != "SFT"]


def where(groups: Sequence[Group], kl: float | None) -> float | None:
    """Where to compare, in nats, where `kl` does not say: at the one place that all groups would choose, if they agree
    on one.
    """
    if kl is not None:
        return kl
    chosen = {group.kl() for group in groups}
    return chosen.pop() if len(chosen) == 1 else None


def tables(groups: Sequence[Group], kl: float | None) -> list[Table]:
    """For each measure a row for each rival; then the differences of rivals; kl: also there, in nats."""
    if not several_seeds(groups):
        return []
    level, found = _confidence(groups), kinds(groups)
    made = _told_of(found, found, MEASURES, level)
    if kl is not None:
        there = kinds(groups, lambda group: rows_at(group, kl))
        # Best-of-n was measured on the exam's questions, the others on held-back prompts: no pair.
        watched = [kind for kind in there if not any("kl_bound" in row for row in kind.rows.values())]
        made += _told_of(
            there, watched, [replace(one, title=f"At {show(kl)} nats: {one.title}") for one in AT_KL], level
        )
    return made


def _told_of(found: Sequence[Kind], paired: Sequence[Kind], measures: Sequence[Measure], level: float) -> list[Table]:
    """A table for each measure that is known, then the differences by the first of them, among those of `paired`."""
    known = [measure for measure in measures if any(_values(kind, measure.key) for kind in found)]
    made = [_by_seed(found, measure, level) for measure in known]
    differences = _paired(paired, known[0], level) if known else None
    return made if differences is None else [*made, differences]


def to_json(groups: Sequence[Group], kl: float | None) -> dict[str, Any] | None:
    """The same as numbers: measure -> rival -> seeds, mean, interval; None where the groups are not seeds of one."""
    if not several_seeds(groups):
        return None
    level = _confidence(groups)
    told: dict[str, Any] = {"confidence": level, "exam": _numbers(kinds(groups), MEASURES, level)}
    if kl is not None:
        told["at_kl"] = {"kl": kl, **_numbers(kinds(groups, lambda group: rows_at(group, kl)), AT_KL, level)}
    return told


def _numbers(found: Sequence[Kind], measures: Sequence[Measure], level: float) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for measure in measures:
        for kind in found:
            if values := _values(kind, measure.key):
                mean = _mean(list(values.values()), level)
                ends = {} if mean is None else {"mean": mean.mean, "low": mean.low, "high": mean.high}
                told.setdefault(measure.key, {})[kind.label] = {"seeds": values, **ends}
    return told


def _by_seed(found: Sequence[Kind], measure: Measure, level: float) -> Table:
    seeds = sorted({seed for kind in found for seed in kind.rows})
    made = []
    for kind in found:
        values = _values(kind, measure.key)
        if values:
            cells = [show(values.get(seed), measure.digits, signed=measure.signed) for seed in seeds]
            made.append((kind.label, *cells, _told(_mean(list(values.values()), level), measure)))
    head = ("", *(f"seed {seed}" for seed in seeds), f"mean [{100 * level:.3g}% over seeds]")
    return Table(measure.title, head, made)


def _paired(found: Sequence[Kind], measure: Measure, level: float) -> Table | None:
    """The mean difference of each two rivals over the seeds that both have, with its interval."""
    made = []
    for one, other in combinations(found, 2):
        mine, theirs = _values(one, measure.key), _values(other, measure.key)
        both = sorted(mine.keys() & theirs.keys())
        difference = _mean([mine[seed] - theirs[seed] for seed in both], level)
        if difference is not None:
            wins = sum(mine[seed] > theirs[seed] for seed in both)
            told = _told(difference, Measure(measure.key, "", measure.digits, signed=True))
            made.append((f"{one.label} less {other.label}", f"{wins} of {len(both)}", told))
    title = f"{measure.title}, seed by seed; intervals are not widened for their number ({len(made)})"
    return Table(title, ("", "higher on", "mean difference"), made) if made else None


def _values(kind: Kind, key: str) -> dict[int, float]:
    return {seed: row[key] for seed, row in kind.rows.items() if row.get(key) is not None}


def _mean(values: Sequence[float], level: float) -> Interval | None:
    return over_seeds(values, confidence=level) if len(values) > 1 else None


def _confidence(groups: Sequence[Group]) -> float:
    """The coverage of the exam's intervals: these have the same."""
    known = number(groups[0].rivals[0].run.summary, "confidence")
    return known if known is not None and 0 < known < 1 else CONFIDENCE


def _told(found: Interval | None, measure: Measure) -> str:
    if found is None:
        return DASH
    within = (found.mean, max(found.low, measure.least), min(found.high, measure.most))
    mean, low, high = (show(one, measure.digits, signed=measure.signed) for one in within)
    # Seeds that all agree to the last digit tell nothing of how far another would be.
    return f"{mean} [{low.rstrip('%')}, {high.rstrip('%')}]" if found.high > found.low else mean


def _settings(groups: Sequence[Group]) -> dict[str, str]:
    """Name of a run -> what it is called over seeds: its method, and the keys by which others of that method differ."""
    rivals = [rival for group in groups for rival in group.rivals]
    sections = {rival.name: _flat(rival) for rival in rivals}
    called = {}
    for rival in rivals:
        alike = [sections[other.name] for other in rivals if other.method == rival.method]
        known = set.intersection(*(set(one) for one in alike))  # a key that was not there yet had its default
        keys = sorted(key for key in known if len({digest_json(one[key]) for one in alike}) > 1)
        told = ", ".join(f"{key} {sections[rival.name][key]}" for key in keys)
        called[rival.name] = f"{rival.method} ({told})" if told else rival.method
    for group in groups:
        names = [called[rival.name] for rival in group.rivals]
        for rival in group.rivals:
            if names.count(called[rival.name]) > 1:
                called[rival.name] = rival.name
    return called


def _flat(rival: Rival) -> dict[str, Any]:
    """Dotted key -> value of what made the policy: its section, the guard, and the watch, which chose its weights."""

    def walk(tree: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(tree, Mapping):
            return {prefix: tree}
        return {name: value for key, one in tree.items() for name, value in walk(one, f"{prefix}.{key}").items()}

    recipe = rival.run.recipe
    sections = (policy_stage(recipe), "watch", "guard")
    return {name: value for part in sections if part in recipe for name, value in walk(recipe[part], part).items()}
