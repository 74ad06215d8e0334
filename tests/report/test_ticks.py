"""Ticks: no two labels alike, none with digits that say nothing."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from stackllama.report.ticks import label_ticks, labels


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 0.5, 1.0], ["0", "0.5", "1.0"]),
        ([0.198, 0.2, 0.202], ["0.198", "0.200", "0.202"]),
        ([-20.0, 0.0, 20.0], ["−20", "0", "20"]),
        ([98.75, 98.8, 98.85], ["98.75", "98.80", "98.85"]),
        ([0.0, 5e-6, 1e-5, 1.5e-5], ["0", "0.5e-5", "1.0e-5", "1.5e-5"]),
        ([1e6, 2e6], ["1e6", "2e6"]),
        ([2000.0, 4000.0], ["2,000", "4,000"]),
        ([3.0], ["3"]),
        ([], []),
    ],
)
def test_labels_have_the_digits_that_tell_them_apart(values: list[float], texts: list[str]) -> None:
    assert labels(values) == texts


def test_differences_have_their_sign() -> None:
    assert labels([-5.0, 0.0, 5.0], signed=True) == ["−5", "0", "+5"]


@pytest.mark.parametrize(
    "ends", [(0.2, 0.2), (0.2, 0.2000000001), (0.98761, 0.98769), (-3.0, 8.0), (0.0, 0.0), (1e-7, 9e-7)]
)
@pytest.mark.parametrize("percent", [False, True])
def test_no_two_labels_are_alike(ends: tuple[float, float], percent: bool) -> None:
    axes = Figure().add_subplot()
    axes.plot([0, 1], ends)
    label_ticks(axes, "y", 4, percent=percent)
    texts = [label.get_text() for label in axes.get_yticklabels()]
    low, high = axes.get_ylim()
    assert 2 <= len(texts) <= 6
    assert len(set(texts)) == len(texts)
    assert all(low <= place <= high for place in axes.get_yticks())
    assert all(text.endswith("%") == percent for text in texts)
