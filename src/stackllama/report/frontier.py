"""Figures of gain over KL: what policies reach, and what it costs, in the manner of `figures.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stackllama.report.figures import HEIGHT, INKS, STYLE, WIDTH, Log, Points, as_svg
from stackllama.report.ticks import MINUS, label_ticks

Dashes = str | tuple[float, tuple[float, ...]]

LEGEND_COLUMNS, LEGEND_ROW = 3, 0.2
"""Entries beside one another, and inches that each further row takes."""


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: (KL, gain) in the order in which the policy passed through them; `ringed`: those to point out."""

    label: str
    ink: str
    dashes: Dashes
    marker: str
    points: Points
    ringed: Points = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of its own, with its interval of gain where it is known."""

    label: str
    ink: str
    marker: str
    kl: float
    gain: float
    low: float | None = None
    high: float | None = None


def curve(log: Log, metric: str, *, only: float | None = math.nan) -> Points:
    """(KL, value) of a metric at each evaluation of a log, in the order of steps; only: at that step alone, if any."""
    kl = dict(log.get("kl", ()))
    every = only is not None and math.isnan(only)
    return tuple((kl[step], value) for step, value in log.get(metric, ()) if step in kl and (every or step == only))


def draw(
    name: str,
    title: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    *,
    bound: float | None = None,
    columns: int = LEGEND_COLUMNS,
) -> str:
    """The figure as SVG; `bound`: a KL that is drawn as a dashed upright line."""
    named = [*(line.label for line in lines), *(mark.label for mark in marks if mark.label)]
    rows = math.ceil(len(named) / columns)
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, HEIGHT + LEGEND_ROW * max(0, rows - 1)), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _line(axes, line)
        for mark in marks:
            _mark(axes, mark)
        if bound is not None:
            axes.axvline(bound, color=INKS["limit"], linewidth=1.3, linestyle=(0, (4, 3)))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, borderpad=0, fontsize=9.5)
        axes.set_xlabel("KL from the SFT model, nats", loc="right")
        axes.margins(x=0.04, y=0.12)
        label_ticks(axes, "x", 5)
        label_ticks(axes, "y", 5)
        said = [f"{line.label}: {', '.join(_spoken(*point) for point in line.points)}" for line in lines]
        said += [f"{mark.label}: {_spoken(mark.kl, mark.gain)}" for mark in marks if mark.label]
        return as_svg(figure, name, f"{title}. {'; '.join(said)}")


def _spoken(kl: float, gain: float) -> str:
    return f"{gain:+.2f} at {kl:.2f} nats".replace("-", MINUS)


def _line(axes: Axes, line: Line) -> None:
    ink = INKS[line.ink]
    at, gains = [x for x, _ in line.points], [y for _, y in line.points]
    label = f" {line.label}" if line.label.startswith("_") else line.label  # which the legend would leave out
    axes.plot(at, gains, color=ink, linestyle=line.dashes, marker=line.marker, markersize=4, label=label)
    for x, y in line.ringed:
        axes.plot([x], [y], "o", markersize=10, markerfacecolor="none", markeredgecolor=ink)


def _mark(axes: Axes, mark: Mark) -> None:
    ink = INKS[mark.ink]
    if mark.low is not None and mark.high is not None:
        axes.plot([mark.kl] * 2, [mark.low, mark.high], color=ink, linewidth=1.2, solid_capstyle="butt")
    label = mark.label or "_"  # matplotlib leaves out of the legend what begins with this
    axes.plot(
        [mark.kl], [mark.gain], mark.marker, color=ink, markersize=8, markeredgecolor=ink, label=label, linestyle=""
    )
