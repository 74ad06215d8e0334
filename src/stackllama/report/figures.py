"""Inline SVG figures for pages: curves of a stage's log, and dot-and-whisker plots of intervals (`bars.py`: bars).

A figure is drawn with matplotlib in stand-in colours (`INKS`), which become CSS variables of the page afterwards, so
one drawing serves light, dark and print. The same numbers give the same bytes: fixed hash salt, no date, style files
of the machine ignored. Figures are drawn small (about a phone's width) and stand beside one another on wide screens, so
that their text stays readable when they are scaled.

Left out on purpose: y-axis labels and titles. The caption in the page carries both, and wraps.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stackllama.report.ticks import MINUS, label_ticks

Points = tuple[tuple[float, float], ...]
"""(step, value) in rising order of steps."""

Log = Mapping[str, Points]
"""Metric name to its points: one stage's `metrics.jsonl`, column by column."""

INKS = {
    "text": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "accent": "#040404",
    "second": "#050505",
    "limit": "#060606",
}
"""Role to stand-in colour; each becomes `var(--role)`."""

WIDTH, HEIGHT = 4.7, 2.5
"""Inches of a curve; 72 SVG units each."""

POINTS = 400
"""A curve has at most this many points: longer logs are averaged in equal runs of steps, so a page stays small."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stackllama",
    "text.parse_math": False,
    "text.color": INKS["text"],
    "font.size": 10.0,
    "axes.facecolor": "none",
    "axes.edgecolor": INKS["grid"],
    "axes.labelcolor": INKS["muted"],
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INKS["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": INKS["grid"],
    "ytick.color": INKS["grid"],
    "xtick.labelcolor": INKS["muted"],
    "ytick.labelcolor": INKS["muted"],
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """What a figure shows: `metrics` is (name in the log, label, ink) of each line, `band` one around the first."""

    name: str
    title: str
    caption: str
    metrics: tuple[tuple[str, str, str], ...]
    band: str | None = None
    percent: bool = False
    main: bool = True


@dataclass(frozen=True, slots=True)
class Interval:
    """One row of a dot-and-whisker plot; an end that is not known is None and is not drawn."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    ink: str = "accent"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure ready for the page; `svg` is our own markup, all text in it escaped; `smooth`: it has running means."""

    title: str
    caption: str
    svg: str
    main: bool = True
    smooth: bool = False


def _one(name: str, title: str, caption: str, *, percent: bool = False, main: bool = True) -> Plot:
    return Plot(name, title, caption, ((name, title, "accent"),), percent=percent, main=main)


_GRADIENT = _one("gradient_norm", "Gradient norm", "before clipping", main=False)
_RATE = _one("learning_rate", "Learning rate", "of each optimizer step", main=False)
_PREFERENCE = (
    _one("loss", "Loss", "negative log-likelihood of the crowd's preference; a coin flip is 0.69"),
    _one("accuracy", "Accuracy", "share of the step's training pairs ranked as the crowd did", percent=True),
    _one("margin", "Margin", "score of the better answer minus that of the worse one", main=False),
    _one("length_slope", "Length slope", "what the score of an answer e times as long is higher", main=False),
    _GRADIENT,
    _RATE,
)
PLOTS: Mapping[str, tuple[Plot, ...]] = {
    "sft": (
        _one("loss", "Loss", "mean negative log-likelihood of a token, in nats"),
        _one("perplexity", "Held-out perplexity", "on answers that training never sees; lower is better"),
        _GRADIENT,
        _RATE,
        _one("tokens_per_second", "Speed", "tokens a second", main=False),
    ),
    "reward": _PREFERENCE,
    "judge": _PREFERENCE,
    "dpo": (
        _one("loss", "Loss", "of a pair; DPO begins at 0.69, a coin flip"),
        _one("accuracy", "Accuracy", "share of the step's pairs whose better answer the policy favours", percent=True),
        Plot(
            "rewards",
            "Implied rewards",
            "beta times the log-ratio of policy and SFT model, mean over pairs",
            (("better_reward", "better answer", "accent"), ("worse_reward", "worse answer", "second")),
        ),
        _one("margin", "Margin", "implied reward of the better answer minus that of the worse one", main=False),
        _GRADIENT,
        _RATE,
    ),
    "ppo": (
        Plot(
            "reward",
            "Reward",
            "mean over a batch's answers by the training reward model; the band is one standard deviation",
            (("reward", "Reward", "accent"),),
            band="reward_std",
        ),
        _one("kl", "KL from the SFT model", "in nats, summed over an answer's tokens, mean over answers"),
        _one("length", "Answer length", "in tokens, its end token included"),
        _one("eos_rate", "Finished answers", "share that ended by themselves, not by the length limit", percent=True),
        _one("entropy", "Entropy", "of the next-token distribution, in nats a token"),
        Plot(
            "ratio",
            "Probability ratio",
            "new over old policy for each token",
            (("ratio_mean", "mean", "accent"), ("ratio_max", "largest", "second")),
        ),
        _one("clip_fraction", "Clip fraction", "share of tokens whose ratio was clipped", percent=True),
        _one("kl_coefficient", "KL coefficient", "price of one nat in the reward"),
        _one("policy_loss", "Policy loss", "clipped surrogate, mean over tokens", main=False),
        _one("kl_loss", "KL loss", "the KL term of the loss before its price, in nats a token", main=False),
        _one("value_loss", "Value loss", "half the squared error of the value head, clipped", main=False),
        _one(
            "explained_variance",
            "Explained variance",
            "of returns by values; 1 is perfect, 0 a constant guess",
            main=False,
        ),
        _one("approximate_kl", "Update size", "half the squared log-ratio of new to old policy, a token", main=False),
        _one("reward_scale", "Reward scale", "deviation of all scores so far, which scores are divided by", main=False),
        _one("reward_clipped", "Cut rewards", "share of answers whose score was cut", percent=True, main=False),
        _one(
            "sampler_difference",
            "Sampler difference",
            "mean distance of sampler and trainer log-probabilities",
            main=False,
        ),
        _GRADIENT,
        _one("episodes_per_second", "Speed", "episodes a second", main=False),
    ),
}
"""Figures of each stage in reading order; those with `main` false go into the folded part."""


def stage(name: str, log: Log, *, targets: Mapping[str, tuple[str, float]] | None = None) -> list[Drawn]:
    """The figures of stage `name` (a key of `PLOTS`) that the log has points for; `targets`: plot to (label, value)."""
    drawn = []
    for plot in PLOTS[name]:
        if any(log.get(metric) for metric, _, _ in plot.metrics):
            target = (targets or {}).get(plot.name)
            smooth = any(running_mean(thinned(log.get(metric, ())))[0] > 1 for metric, _, _ in plot.metrics)
            svg = curves(name, plot, log, target)
            drawn.append(Drawn(plot.title, _full_caption(plot, log), svg, plot.main, smooth))
    return drawn


def curves(prefix: str, plot: Plot, log: Log, target: tuple[str, float] | None = None) -> str:
    """One line for each metric of `plot` over steps, with its running mean where the log is long, and a target line."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for metric, label, ink in plot.metrics:
            _line(axes, thinned(log.get(metric, ())), label, INKS[ink])
        if plot.band is not None:
            _band(axes, log.get(plot.metrics[0][0], ()), log.get(plot.band, ()))
        if target is not None:
            _target(axes, *target)
        if len(plot.metrics) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderpad=0, fontsize=9.5)
        axes.set_xlabel("step", loc="right")
        axes.margins(x=0.02, y=0.08)
        if plot.percent:
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(high, 1.02))
        label_ticks(axes, "x", 5, integer=True)
        label_ticks(axes, "y", 4, percent=plot.percent)
        return as_svg(figure, f"{prefix}-{plot.name}", _in_words(plot, log))


def whiskers(
    name: str,
    title: str,
    intervals: Sequence[Interval],
    *,
    reference: float | None,
    percent: bool,
    signed: bool = False,
) -> str:
    """Dots with their intervals, one row each, first on top; `reference` is a dashed upright line (a coin, 0)."""
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, 0.62 + 0.46 * len(intervals)), layout="constrained")
        axes = figure.add_subplot()
        for row, interval in enumerate(intervals):
            _whisker(axes, -row, interval, percent=percent, signed=signed)
            if reference is not None:  # beside the row's whisker alone: through its words it would cross them out
                ends = [-row - 0.36, -row + 0.16]
                axes.plot([reference] * 2, ends, color=INKS["muted"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.set_ylim(-len(intervals) + 0.4, 0.75)
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.margins(x=0.08)
        label_ticks(axes, "x", 5, percent=percent and not signed, points=percent and signed)
        words = "; ".join(_interval_text(i, percent=percent, signed=signed, label=True) for i in intervals)
        return as_svg(figure, name, f"{title}: {words}")


def thinned(points: Points, *, limit: int = POINTS) -> Points:
    """At most `limit` points, each the mean step and value of an equal run of neighbours; short logs stay."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return points
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple((sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs)


def running_mean(points: Points) -> tuple[int, Points]:
    """(window, points): centred mean over an odd window of about a twentieth of the curve; window 1 under 40 points."""
    window = max(len(points) // 20, 1) | 1 if len(points) >= 40 else 1
    half = window // 2
    smooth = []
    for at, (step, _) in enumerate(points):
        near = points[max(at - half, 0) : at + half + 1]
        smooth.append((step, sum(y for _, y in near) / len(near)))
    return window, tuple(smooth)


def _line(axes: Axes, points: Points, label: str, colour: str) -> None:
    if not points:
        return
    window, smooth = running_mean(points)
    if window > 1:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.35)
    marker = "o" if len(points) < 12 else ""
    axes.plot(*zip(*smooth, strict=True), color=colour, linewidth=1.8, label=label, marker=marker, markersize=4)


def _band(axes: Axes, centre: Points, deviation: Points) -> None:
    widths = dict(deviation)
    both = tuple((step, value, widths[step]) for step, value in centre if step in widths)
    _, middle = running_mean(thinned(tuple((step, value) for step, value, _ in both)))
    _, width = running_mean(thinned(tuple((step, around) for step, _, around in both)))
    if middle:
        low = [y - w for (_, y), (_, w) in zip(middle, width, strict=True)]
        high = [y + w for (_, y), (_, w) in zip(middle, width, strict=True)]
        axes.fill_between([x for x, _ in middle], low, high, color=INKS["accent"], alpha=0.12, linewidth=0)


def _target(axes: Axes, label: str, value: float) -> None:
    axes.axhline(value, color=INKS["limit"], linewidth=1.3, linestyle=(0, (4, 3)))
    place = axes.get_yaxis_transform()
    axes.annotate(label, (0.01, value), (0, 3), place, "offset points", color=INKS["limit"], fontsize=9.5)


def _whisker(axes: Axes, y: float, interval: Interval, *, percent: bool, signed: bool) -> None:
    colour = INKS[interval.ink]
    low = interval.value if interval.low is None else interval.low
    high = interval.value if interval.high is None else interval.high
    if high > low:
        axes.plot([low, high], [y, y], color=colour, linewidth=2.0, solid_capstyle="butt")
    for end in (interval.low, interval.high):
        if end is not None:
            axes.plot([end, end], [y - 0.13, y + 0.13], color=colour, linewidth=2.0, solid_capstyle="butt")
    axes.plot([interval.value], [y], "o", color=colour, markersize=7)
    axes.text(0, y + 0.24, interval.label, transform=axes.get_yaxis_transform(), va="bottom", ha="left")
    number = _interval_text(interval, percent=percent, signed=signed, label=False)
    axes.text(1, y + 0.24, number, transform=axes.get_yaxis_transform(), va="bottom", ha="right", color=INKS["muted"])


def _interval_text(interval: Interval, *, percent: bool, signed: bool, label: bool) -> str:
    unit = 100 if percent else 1
    sign = "+" if signed else ""
    digits = 1 if percent else 2
    end = "" if not percent else " points" if signed else "%"

    def one(value: float) -> str:
        return f"{value * unit:{sign}.{digits}f}".replace("-", MINUS)

    text = one(interval.value) + end
    if interval.low is not None and interval.high is not None:
        text += f" [{one(interval.low)}, {one(interval.high)}]"
    elif interval.low is not None:
        text += f" [from {one(interval.low)}]"
    return f"{interval.label} {text}" if label else text


def _full_caption(plot: Plot, log: Log) -> str:
    size = math.ceil(max(len(log.get(metric, ())) for metric, _, _ in plot.metrics) / POINTS)
    caption = plot.caption[0].upper() + plot.caption[1:]
    return f"{caption}; each point is the mean of {size} logged values." if size > 1 else f"{caption}."


def _in_words(plot: Plot, log: Log) -> str:
    """What a screen reader says: first, last, least and greatest value of each line."""
    said = []
    for metric, label, _ in plot.metrics:
        values = [value for _, value in log.get(metric, ())]
        if values:
            numbers = (f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values)))
            said.append("{}: first {}, last {}, least {}, greatest {}".format(label, *numbers))
    return f"{plot.title} over steps. " + ". ".join(said)


def _shortened(tag: str) -> str:
    """A tag with coordinates of two decimals: more are beyond what a screen shows, and half of the page."""
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag)


def as_svg(figure: Figure, name: str, words: str) -> str:
    """The figure as one `<svg>` for an HTML body: no prologue, ids that start with `name`, colours of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a viewBox"
    head = f'<svg class="plot" role="img" aria-label="{html.escape(words)}" {box[0]} xmlns="http://www.w3.org/2000/svg"'
    text = re.sub(r"<svg[^>]*>", lambda _: f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'url\(#|xlink:href="#', lambda found: f"{found[0]}{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    for role, colour in INKS.items():
        text = text.replace(colour, f"var(--{role})")
    text = re.sub(r"<(?!svg)[^>]*>", lambda tag: _shortened(tag[0]), text)
    return re.sub(r">\s+<", "><", re.sub(r" \n", " ", text)).strip()
