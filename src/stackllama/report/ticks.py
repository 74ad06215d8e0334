"""Ticks of figures: at round places, each with a label of its own and no more digits than tell them apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

MINUS = "\N{MINUS SIGN}"

ROUND = [1, 2, 5, 10]
"""Ticks stand at these multiples of powers of ten: they read faster than 8s and 16s."""

_FLAT = 1e-6
"""Share of its size by which a range must differ to be one: less is the rounding of a number that stays."""

_PLAIN = (1e-3, 1e6)
"""Between these the largest label is written out; beyond them with a power of ten."""


def label_ticks(
    axes: Axes,
    which: Literal["x", "y"],
    most: int,
    *,
    integer: bool = False,
    percent: bool = False,
    points: bool = False,
) -> None:
    """Set about `most` ticks within the limits of an axis, which are final from here on.

    percent: values are shares, shown as 12%; points: they are differences of shares, shown as +12. A range without
    width (all values the same) is widened first.
    """
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    if high - low <= _FLAT * max(abs(low), abs(high)):
        middle = (low + high) / 2
        low, high = middle - (abs(middle) / 10 or 1), middle + (abs(middle) / 10 or 1)
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    found = MaxNLocator(most, steps=ROUND, integer=integer).tick_values(low, high)
    slack = 1e-9 * (high - low)
    places = [float(place) for place in found if low - slack <= place <= high + slack]
    texts = labels([100 * place for place in places] if percent or points else places, signed=points)
    (axes.set_xticks if which == "x" else axes.set_yticks)(places, [f"{t}%" if percent else t for t in texts])


def labels(values: Sequence[float], *, signed: bool = False) -> list[str]:
    """Texts of evenly spaced numbers: as many decimals as their spacing needs, all the same; 0 has no sign."""
    largest = max(map(abs, values), default=0.0)
    step = min((abs(b - a) for a, b in itertools.pairwise(values)), default=largest)
    sign = "+" if signed else ""
    if 0 < largest < _PLAIN[0] or largest >= _PLAIN[1]:
        power = math.floor(math.log10(largest))
        mantissas = labels([value / 10**power for value in values], signed=signed)
        return [
            text if text == "0" or not value else f"{text}e{power}"
            for text, value in zip(mantissas, values, strict=True)
        ]
    digits = next(digits for digits in range(16) if _fits(values, step, digits))
    texts = [f"{value:{sign},.{digits}f}" for value in values]
    return [text if any(c in text for c in "123456789") else "0" for text in (t.replace("-", MINUS) for t in texts)]


def _fits(values: Sequence[float], step: float, digits: int) -> bool:
    """Whether rounding to so many decimals moves no value by more than a hundredth of the spacing."""
    return digits == 15 or all(abs(value - round(value, digits)) <= 0.01 * step for value in values)
