"""The audit of a reward model on a page: what it comes to, and its numbers as figures and tables.

All numbers come from `reward/audit.json` (docs/metrics.md). A file of another form gives no figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from stackllama.report.figures import INKS, STYLE, Drawn, Interval, as_svg, whiskers
from stackllama.report.reading import number
from stackllama.report.tables import Table
from stackllama.report.ticks import label_ticks
from stackllama.report.verdict import show, span

SQUARE = 3.2
"""Inches of a side of the reliability curve."""


@dataclass(frozen=True, slots=True)
class Audited:
    """What the page shows: sentences, figures, and a table of what changed answers do."""

    findings: Sequence[str]
    figures: Sequence[Drawn]
    reactions: Table | None


def audited(found: Mapping[str, Any]) -> Audited | None:
    """The audit of a reward model as the page shows it; None where there is none."""
    findings = [text for text in _list(found, "findings") if isinstance(text, str)]
    figures = [*_slices(found), *_reliability(found)]
    return Audited(findings, figures, _reactions(found)) if findings or figures else None


def rules(found: Mapping[str, Any]) -> tuple[list[Interval], list[Interval]]:
    """Accuracy of each baseline, and what the model's is over it, as rows of figures."""
    accuracies, overs = [], []
    for one in _list(found, "baselines"):
        accuracy, over = _interval(one, "accuracy"), _interval(one, "over")
        if accuracy is not None and over is not None:
            label = str(one.get("label", ""))
            accuracies.append(Interval(f"Baseline: {label}", *accuracy, "second"))
            overs.append(Interval(f"Over: {label}", *over))
    return accuracies, overs


def _slices(found: Mapping[str, Any]) -> Iterator[Drawn]:
    slices = found.get("slices")
    for name, cut in slices.items() if isinstance(slices, Mapping) else ():
        rows = []
        for one in cut if isinstance(cut, list) else ():
            pairs = number(one, "pairs") if isinstance(one, Mapping) else None
            if pairs is None:
                continue
            accuracy, label = _interval(one, "accuracy"), f"{one.get('label')} ({show(pairs, 0)} pairs)"
            if accuracy is not None:
                rows.append(Interval(label, *accuracy))
        if rows:
            title = f"By {name}"
            svg = whiskers(f"slice-{name.replace(' ', '-')}", title, rows, reference=0.5, percent=True)
            yield Drawn(title, "Accuracy on some of the held-out pairs. Dashed: a coin.", svg, main=name in MAIN)


MAIN = ("score gap", "length of the better answer over the worse")
"""Cuts that are shown at once."""


def _reliability(found: Mapping[str, Any]) -> Iterator[Drawn]:
    calibration = found.get("calibration")
    bins = [
        (confidence, accuracy)
        for one in _list(calibration, "bins")
        if (confidence := number(one, "confidence")) is not None and (accuracy := number(one, "accuracy")) is not None
    ]
    if not bins:
        return
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(SQUARE * 1.45, SQUARE), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0.5, 1], [0.5, 1], color=INKS["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot(*zip(*bins, strict=True), color=INKS["accent"], marker="o", markersize=4)
        axes.set_xlabel("how sure it is", loc="right")
        axes.margins(x=0.04, y=0.06)
        label_ticks(axes, "x", 5, percent=True)
        label_ticks(axes, "y", 5, percent=True)
        said = ", ".join(f"{100 * right:.0f}% right at {100 * sure:.0f}%" for sure, right in bins)
        svg = as_svg(figure, "reliability", f"Reliability: {said}")
    error, temperature = number(calibration, "error"), number(calibration, "temperature", "mean")
    yield Drawn(
        "Reliability",
        "How often its choice is right, over how sure it is of it, in groups of equal weight. Dashed: calibrated. "
        f"Expected calibration error {show(error, None)}, temperature {show(temperature)}.",
        svg,
    )


def _reactions(found: Mapping[str, Any]) -> Table | None:
    reactions = found.get("reactions")
    rows = []
    for change, one in reactions.items() if isinstance(reactions, Mapping) else ():
        shift, kept, accuracy = (_interval(one, key) for key in ("shift", "kept", "accuracy"))
        if shift is not None and kept is not None and accuracy is not None:
            rows.append(
                (
                    str(change),
                    f"{show(shift[0], signed=True)} [{span(*shift[1:], signed=True)}]",
                    f"{show(kept[0], None)} [{span(*kept[1:], None)}]",
                    f"{show(100 * accuracy[0], 1, signed=True)} points",
                )
            )
    head = ("answers …", "score, deviations", "pairs ranked as before", "accuracy")
    return Table("What a change of all answers does to the scores", head, rows) if rows else None


def _list(found: Any, key: str) -> list[Any]:
    values = found.get(key) if isinstance(found, Mapping) else None
    return values if isinstance(values, list) else []


def _interval(found: Any, key: str) -> tuple[float, float, float] | None:
    values = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(values, Mapping):
        return None
    mean, low, high = (number(values, end) for end in ("mean", "low", "high"))
    return None if mean is None or low is None or high is None else (mean, low, high)
