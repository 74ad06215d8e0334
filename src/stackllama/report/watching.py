"""What was seen while a policy was trained, as figures: the frontier of reward over KL, and each measure of hacking.

All numbers come from the stage's `watch.jsonl`, one point for each of its lines; limits and bound come from the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stackllama.report.figures import HEIGHT, INKS, STYLE, WIDTH, Drawn, Log, as_svg
from stackllama.report.frontier import Line, curve, draw
from stackllama.report.reading import number
from stackllama.report.ticks import MINUS, label_ticks

SCORERS = (
    ("reward_gain", "training reward", "second", (0, (5, 2))),
    ("judge_gain", "judge", "accent", "-"),
    ("gold_gain", "gold", "muted", (0, (1, 1.5))),
)
"""(name in the log, label, ink, dashes) of the lines of the frontier; gold only where there is one."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A change that is drawn over steps. limit: its key in `watch.limits`; factor: the limit holds both ways."""

    metric: str
    limit: str
    title: str
    caption: str
    percent: bool = False
    factor: bool = False


MEASURES = (
    Measure("distance", "distance", "Reward beyond the judge", "Gain by the training reward minus gain by the judge."),
    Measure("length_ratio", "length", "Length", "Times as long as the SFT model's answers, in tokens.", factor=True),
    Measure("repetition_rise", "repetition", "Repetition", "Rise of the share of repeated 4-grams.", percent=True),
    Measure(
        "fences_rise",
        "fences",
        "Code blocks",
        "Rise of the share of answers with empty or repeated code blocks.",
        percent=True,
    ),
    Measure(
        "perplexity_ratio",
        "perplexity",
        "Perplexity under the SFT model",
        "Times that of the SFT model's own answers; gibberish is high.",
    ),
)


def figures_of(log: Log, recipe: Mapping[str, Any], *, chosen: float | None) -> list[Drawn]:
    """The figures that the log has points for, the frontier first; none where nothing was watched.

    chosen: the step whose weights were left, which is ringed.
    """
    if not log.get("kl"):
        return []
    limits = {one.limit: number(recipe, "watch", "limits", one.limit) for one in MEASURES}
    over_steps = [_over_steps(one, log, limits[one.limit]) for one in MEASURES if log.get(one.metric)]
    return [frontier(log, bound=number(recipe, "watch", "kl_bound"), chosen=chosen), *over_steps]


def words(summary: Mapping[str, Any], stage: str) -> list[str]:
    """What became of this stage's training, in sentences: what stopped it before its end, and which weights it left."""
    found = summary.get(stage)
    texts = found if isinstance(found, Mapping) else {}
    said, step = [], number(summary, stage, "chosen_step")
    if isinstance(stopped := texts.get("stopped_because"), str):
        said.append(f"The training ended before its last batch: {stopped}.")
    if step is not None and isinstance(reason := texts.get("chosen_because"), str):
        said.append(f"The policy has the weights of step {step:,.0f}: {reason}.")
    return said


def frontier(log: Log, *, bound: float | None, chosen: float | None) -> Drawn:
    """Gains by each scorer over the KL that they cost, joined in the order of steps; Gao et al. 2023 draw the same."""
    if bound is not None and bound > 1.5 * max(nats for _, nats in log["kl"]):  # far away it would squeeze the curves
        bound = None
    lines = [
        Line(label, ink, dashes, "o", curve(log, metric), ringed=curve(log, metric, only=chosen))
        for metric, label, ink, dashes in SCORERS
    ]
    svg = draw("watch-frontier", "Reward over KL", [line for line in lines if line.points], bound=bound)
    limit = f"; dashed upright: the bound of {bound:g} nats" if bound is not None else ""
    ring = "; ringed: the weights that were left" if chosen is not None else ""
    caption = (
        "Gain over the SFT model's answers, in standard deviations of their scores, over the KL that it costs; one "
        f"point for each evaluation, in order{ring}{limit}."
    )
    return Drawn("Reward over KL", caption, svg)


def _over_steps(measure: Measure, log: Log, limit: float | None) -> Drawn:
    points = log[measure.metric]
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*points, strict=True), color=INKS["accent"], marker="o", markersize=4)
        low, high = (dict(log.get(f"{measure.metric}_{end}", ())) for end in ("low", "high"))
        both = [step for step, _ in points if step in low and step in high]
        axes.fill_between(
            both, [low[s] for s in both], [high[s] for s in both], color=INKS["accent"], alpha=0.12, linewidth=0
        )
        for value in _limits(measure, limit):
            _mark(axes, value, points)
        axes.set_xlabel("step", loc="right")
        axes.margins(x=0.02, y=0.08)
        label_ticks(axes, "x", 5, integer=True)
        label_ticks(axes, "y", 4, points=measure.percent)
        spoken = ", ".join(f"{value:.3g} at step {step:g}" for step, value in points)
        svg = as_svg(figure, f"watch-{measure.metric}", f"{measure.title} over steps: {spoken}".replace("-", MINUS))
    told = "" if limit is None else f" Alarm where the whole band is beyond {_limit_words(measure, limit)}."
    return Drawn(measure.title, measure.caption + told, svg)


def _limits(measure: Measure, limit: float | None) -> Sequence[float]:
    if limit is None:
        return ()
    return (1 / limit, limit) if measure.factor else (limit,)


def _limit_words(measure: Measure, limit: float) -> str:
    if measure.percent:
        return f"{100 * limit:g} points"
    return f"{limit:g}, or below {1 / limit:g}" if measure.factor else f"{limit:g}"


def _mark(axes: Axes, value: float, points: Sequence[tuple[float, float]]) -> None:
    """A limit as a dashed line, where it is near enough to what is drawn not to squeeze it."""
    values = [y for _, y in points]
    reach = max(max(values) - min(values), 0.25 * abs(value))
    if min(values) - reach <= value <= max(values) + reach:
        axes.axhline(value, color=INKS["limit"], linewidth=1.3, linestyle=(0, (4, 3)))
