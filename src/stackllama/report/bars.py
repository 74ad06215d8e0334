"""Bars for pages, in the manner of `figures.py`: how often what was counted."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stackllama.data.store.census import Bin
from stackllama.report.figures import HEIGHT, INKS, STYLE, WIDTH, as_svg
from stackllama.report.ticks import MINUS, ROUND

MOST_LABELS = 9


def histogram(name: str, title: str, bins: Sequence[Bin], *, begins: bool = False) -> str:
    """A bar for each bin, of one width whatever the bin's. Below it stands what it counts ("5–8"), or with `begins`, at
    its left end, only where it begins: bins that grow by a factor then make a logarithmic axis.
    """
    labels = [_number(one.low) if begins or one.low == one.high else _range(one) for one in bins]
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(range(len(bins)), [one.count for one in bins], width=0.9, color=INKS["accent"], align="edge")
        shown = _shown(bins, begins)
        axes.set_xticks([at if begins else at + 0.45 for at in shown], [labels[at] for at in shown])
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.margins(x=0.02)
        said = "; ".join(f"{_range(one)}: {one.count:,}" for one in bins)
        return as_svg(figure, name, f"{title}. {said}")


def _shown(bins: Sequence[Bin], begins: bool) -> list[int]:
    """Which bins have a label: at most about `MOST_LABELS`, evenly, that of 0 among them; on a logarithmic axis only
    powers of two.
    """
    fit = [at for at, one in enumerate(bins) if not begins or one.low.bit_count() == 1] or [0]
    step = -(-len(fit) // MOST_LABELS)
    fixed = next((place for place, at in enumerate(fit) if bins[at].low == 0), 0)
    return [at for place, at in enumerate(fit) if (place - fixed) % step == 0]


def _range(one: Bin) -> str:
    if one.low == one.high:
        return _number(one.low)
    between = "\N{HORIZONTAL ELLIPSIS}" if one.low < 0 else "\N{EN DASH}"
    return f"{_number(one.low)}{between}{_number(one.high)}"


def _number(value: int) -> str:
    return (f"{value:,}" if abs(value) >= 10_000 else str(value)).replace("-", MINUS)  # years have four digits
