"""Scores of the policies' answers among those of people's answers, as figures: one for each scorer.

All numbers come from `evaluate/drift.json` (docs/metrics.md). A file of another form gives no figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from stackllama.evaluate.drift import PEOPLE
from stackllama.report.figures import INKS, STYLE, WIDTH, Drawn, as_svg
from stackllama.report.reading import number
from stackllama.report.ticks import label_ticks
from stackllama.report.verdict import show, span

SCORERS = {"reward": "Scores by the training reward model", "judge": "Scores by the judge"}


def figures_of(found: Mapping[str, Any], roles: Sequence[tuple[str, str]]) -> list[Drawn]:
    """A figure for each scorer of the file; roles: (name in the file, label) of the policies."""
    drawn = []
    for scorer, title in SCORERS.items():
        spreads = found.get(scorer)
        rows = [
            (label, quantiles, number(spreads, name, "beyond", "mean"))
            for name, label in ((PEOPLE, "People"), *roles)
            if (quantiles := _quantiles(spreads, name))
        ]
        if len(rows) > 1 and rows[0][0] == "People":
            caption = (
                "Dot: median; thick: the middle half; thin: nine in ten. Dashed: 5% of people's answers lie above."
            )
            drawn.append(Drawn(title, caption, _bars(f"drift-{scorer}", title, rows)))
    return drawn


def words(found: Mapping[str, Any], method: str) -> str:
    """How far out the policy's answers are by both scorers, as a sentence; empty where it is not known."""
    told = []
    for scorer, by in (("reward", "the training reward model"), ("judge", "the judge")):
        share, low, high = (number(found, scorer, "ppo", "beyond", end) for end in ("mean", "low", "high"))
        if share is not None:
            told.append(f"{show(share, None)} by {by} [{span(low, high, None)}]")
    if not told:
        return ""
    return (
        f"Of the answers by {method} so many score above 95% of people's answers to the same questions: "
        f"{', '.join(told)}. Far more by the training reward model than by the judge means that it is asked about "
        "answers that it was not trained on."
    )


_Row = tuple[str, Sequence[float], float | None]


def _quantiles(spreads: Any, name: str) -> tuple[float, ...]:
    spread = spreads.get(name) if isinstance(spreads, Mapping) else None
    given = spread.get("quantiles") if isinstance(spread, Mapping) else None
    found = [number({"value": one}, "value") for one in given] if isinstance(given, list) else []
    known = tuple(one for one in found if one is not None)
    return known if len(known) == 5 else ()


def _bars(name: str, title: str, rows: Sequence[_Row]) -> str:
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, 0.62 + 0.46 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        limit = rows[0][1][-1]
        for row, (label, (lowest, low, middle, high, highest), beyond) in enumerate(rows):
            colour = INKS["muted" if row == 0 else "accent"]
            axes.plot([lowest, highest], [-row] * 2, color=colour, linewidth=1.4, solid_capstyle="butt")
            axes.plot([low, high], [-row] * 2, color=colour, linewidth=6, solid_capstyle="butt")
            axes.plot([middle], [-row], "o", color=INKS["text"], markersize=5)
            axes.plot([limit] * 2, [-row - 0.3, -row + 0.16], color=INKS["muted"], linewidth=1.2, linestyle=(0, (4, 3)))
            place = axes.get_yaxis_transform()
            axes.text(0, -row + 0.24, label, transform=place, va="bottom", ha="left")
            told = f"{show(middle)}" + ("" if beyond is None else f", {show(beyond, None)} beyond")
            axes.text(1, -row + 0.24, told, transform=place, va="bottom", ha="right", color=INKS["muted"])
        axes.set_ylim(-len(rows) + 0.4, 0.75)
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.margins(x=0.08)
        label_ticks(axes, "x", 5)
        return as_svg(figure, name, f"{title}: {'; '.join(_spoken(row) for row in rows)}")


def _spoken(row: _Row) -> str:
    label, (lowest, low, middle, high, highest), beyond = row
    share = "" if beyond is None else f", {show(beyond, None)} beyond people's highest twentieth"
    return f"{label} median {show(middle)}, half {span(low, high)}, nine in ten {span(lowest, highest)}{share}"
