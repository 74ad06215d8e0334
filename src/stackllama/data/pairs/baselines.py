"""What each rule of pairs does to the two baselines, "the longer answer wins" and "the earlier answer wins".

A sample of questions, chosen by a hash, is paired again under other rules: the original ones, then one choice of the
recipe after the other, then what else could have been chosen. All are sums, so buckets are tallied apart.

Legend: Q questions, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stackllama.data.building.shuffle import hashed
from stackllama.data.pairs.pairing import Answers, Pairs, choose
from stackllama.data.pairs.rules import PairRules

SAMPLE = 5000
"""Questions that are looked at, about: a standard error of 0.7 points."""

STATED = "the pairs that the data came with"

_CHOICES = (
    "time",
    "skip_days",
    "posted_within_days",
    "score",
    "conflict",
    "min_gap",
    "min_votes",
    "length_ratio",
    "near_copies",
)
_INSTEAD: tuple[dict[str, Any], ...] = (
    {"time": "off"},
    {"time": "since_later"},
    {"time": "since_later", "skip_days": 2},
    {"posted_within_days": 1},
    {"score": "votes"},
    {"conflict": "votes"},
    {"conflict": "drop"},
    {"min_gap": 2},
    {"min_votes": 2},
    {"length_ratio": 1.5},
)

Sums = list[float]
"""Questions with a pair; pairs; sums and sums of squares of the questions' means: longer, longer, earlier, earlier."""
Row = dict[str, Any]


def ladder(rules: PairRules) -> dict[str, PairRules]:
    """From the original rules to those chosen, one choice at a time, each named as in a recipe."""
    step = PairRules(max_pairs=rules.max_pairs)
    steps = {"the original rules": step}
    for name in _CHOICES:
        if getattr(step, name) != (value := getattr(rules, name)):
            step = replace(step, **{name: value})
            steps[f"{name}: {value}"] = step
    return steps


def alternatives(rules: PairRules) -> dict[str, PairRules]:
    """The rules with one choice made otherwise."""
    found = {}
    for change in _INSTEAD:
        if (other := replace(rules, **change)) != rules:
            found["instead, " + ", ".join(f"{name}: {value}" for name, value in change.items())] = other
    return found


def tally(answers: Answers, stated: Pairs, rules: PairRules, questions: int) -> dict[str, Sums]:
    """The sums over a sample of questions under the rules and what could be chosen instead, by name.

    `questions` is how many there are in all buckets. Questions with `stated` pairs came with them: no rule is asked.
    """
    chosen_Q = _points(answers) < SAMPLE / max(1, questions)
    found = {}
    if len(stated):
        found[STATED] = _sums(answers, stated.some(chosen_Q[stated.question_P]))
    asked_Q = chosen_Q & ~np.isin(np.arange(len(chosen_Q)), stated.question_P)
    if asked_Q.any():
        for name, other in (ladder(rules) | alternatives(rules)).items():
            found[name] = _sums(answers, choose(answers, other, asked_Q)[0])
    return found


def add(tallies: Iterable[Mapping[str, Sums]]) -> list[Row]:
    """The tallies of all buckets together: for each way the baselines with their standard errors (None where nothing
    was left to be compared).
    """
    totals: dict[str, Sums] = {}
    for one in tallies:
        for name, sums in one.items():
            totals[name] = [a + b for a, b in zip(totals.get(name, [0.0] * len(sums)), sums, strict=True)]
    return [_row(name, sums) for name, sums in totals.items()]


def is_row(value: Any) -> bool:
    """Whether a value is one of the rows that `add` gives; what was read from a file may be anything."""
    if not isinstance(value, dict) or not value.keys() >= _row("", [0.0] * 6).keys():
        return False
    counts = all(type(value[name]) is int for name in ("questions", "pairs"))
    means = [value[f"{what}_{part}"] for what in ("longer", "earlier") for part in ("wins", "error")]
    found = all(type(mean) in ((int, float) if value["questions"] else (type(None),)) for mean in means)
    return isinstance(value["rules"], str) and counts and found


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a table of `rows`, for a terminal."""
    wide = max((len(row["rules"]) for row in rows), default=0)
    yield f"{'pairs under':<{wide}}  {'questions':>9}  {'pairs':>7}  {'longer wins':>11}  {'earlier wins':>12}"
    for row in rows:
        means = (
            f"{row[f'{what}_wins']:.3f}±{row[f'{what}_error']:.3f}" if row["questions"] else "-"
            for what in ("longer", "earlier")
        )
        longer, earlier = means
        yield f"{row['rules']:<{wide}}  {row['questions']:>9,}  {row['pairs']:>7,}  {longer:>11}  {earlier:>12}"


def _points(answers: Answers) -> NDArray[np.float64]:
    """A hash of each question, from 0 to 1."""
    sites = pa.chunked_array([[site for site, _ in answers.keys]], pa.string())
    id_Q = np.array([number for _, number in answers.keys], np.int64)
    return (hashed(sites, id_Q) >> np.uint64(11)) / 2.0**53


def _sums(answers: Answers, pairs: Pairs) -> Sums:
    better_P, worse_P = (answers.starts[pairs.question_P] + side for side in (pairs.better_P, pairs.worse_P))
    lead_P = answers.length_A[better_P] - answers.length_A[worse_P]
    # ISO moments of one form sort like the times they stand for.
    first_P, second_P = (np.array([answers.date_A[at] for at in side.tolist()], "U") for side in (better_P, worse_P))
    longer_P, earlier_P = (np.sign(lead_P) + 1) / 2, (1.0 + (first_P < second_P) - (first_P > second_P)) / 2
    _, question_P, size_Q = np.unique(pairs.question_P, return_inverse=True, return_counts=True)
    means = [np.bincount(question_P, won_P, minlength=len(size_Q)) / size_Q for won_P in (longer_P, earlier_P)]
    return [float(len(size_Q)), float(len(pairs)), *(float((m**n).sum()) for m in means for n in (1, 2))]


def _row(name: str, sums: Sums) -> Row:
    questions, pairs, *moments = sums
    longer, longer_error = _mean(questions, *moments[:2])
    earlier, earlier_error = _mean(questions, *moments[2:])
    return {
        "rules": name,
        "questions": int(questions),
        "pairs": int(pairs),
        "longer_wins": longer,
        "longer_error": longer_error,
        "earlier_wins": earlier,
        "earlier_error": earlier_error,
    }


def _mean(count: float, total: float, squares: float) -> tuple[float | None, float | None]:
    """A mean and its standard error."""
    if not count:
        return None, None
    mean = total / count
    return mean, sqrt(max(0.0, squares / count - mean**2) / count)


assert {*_CHOICES, "margin", "max_pairs", "weight"} == {field.name for field in fields(PairRules)}
