from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from stackllama.data.store.census import LENGTH_STARTS, VOTE_STARTS, Bin, Spread
from stackllama.report.bars import histogram
from stackllama.report.figures import INKS


def texts(svg: str) -> list[str]:
    return [str(element.text) for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]


def heights(svg: str) -> list[float]:
    """Of each bar, from the paths that are filled in the page's accent."""
    found = []
    for element in ET.fromstring(svg).iter():
        if element.tag.endswith("path") and "fill: var(--accent)" in str(element.get("style")):
            ys = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", str(element.get("d")))]
            found.append(max(ys) - min(ys))
    return found


def test_bars_are_as_high_as_their_counts() -> None:
    svg = histogram("x", "X", [Bin(0, 0, 4), Bin(1, 1, 1), Bin(2, 5, 2)])
    high, low, middle = heights(svg)
    assert 3.9 < high / low < 4.1
    assert 1.9 < middle / low < 2.1


def test_labels_are_ranges_with_0_among_them() -> None:
    assert {"0", "1", "2–5"} <= set(texts(histogram("x", "X", [Bin(0, 0, 1), Bin(1, 1, 1), Bin(2, 5, 2)])))
    votes = Spread({-40: 1, 0: 3, 700: 1}).bins(VOTE_STARTS)
    shown = texts(histogram("x", "X", votes))
    assert "0" in shown
    assert "−64…−33" in texts(histogram("x", "X", votes[:3]))
    assert 4 <= len([text for text in shown if re.search(r"\d", text)]) <= 16


def test_a_logarithmic_axis_has_powers_of_two() -> None:
    bins = Spread({5: 1, 900: 3, 70_000: 1}).bins(LENGTH_STARTS)
    shown = [int(text.replace(",", "")) for text in texts(histogram("x", "X", bins, begins=True)) if text[0].isdigit()]
    powers = [value for value in shown if value > 4]
    assert len(powers) >= 5
    assert all(value.bit_count() == 1 for value in powers)


def test_years_have_no_comma() -> None:
    assert "2014" in texts(histogram("x", "X", [Bin(2014, 2014, 12_345), Bin(2015, 2015, 1)]))


def test_it_is_drawn_as_the_other_figures_are() -> None:
    svg = histogram("x", "A < B", [Bin(0, 0, 4), Bin(1, 3, 1_234)])
    assert svg == histogram("x", "A < B", [Bin(0, 0, 4), Bin(1, 3, 1_234)])
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "A < B. 0: 4; 1–3: 1,234"
    assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(INKS)
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg)
