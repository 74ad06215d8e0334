"""Figures: deterministic, free of fixed colours, well-formed, and true to the numbers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import pytest

from stackllama.report.figures import INKS, PLOTS, POINTS, Interval, Log, running_mean, stage, thinned, whiskers

ROOT = Path(__file__).parents[2]
LOG: Log = {
    "kl": tuple((float(step), step / 10) for step in range(60)),
    "reward": tuple((float(step), step % 7 - 3.0) for step in range(60)),
    "reward_std": tuple((float(step), 1.0) for step in range(60)),
    "ratio_mean": ((1.0, 1.0), (2.0, 1.01)),
    "clip_fraction": tuple((float(step), 0.01 * (step % 9)) for step in range(60)),
}
ROWS = [Interval("Reward model", 0.70, 0.66, 0.74), Interval("A < B & C", 0.58, None, None, "second")]


def svgs() -> dict[str, str]:
    drawn = {figure.title: figure.svg for figure in stage("ppo", LOG, targets={"kl": ("target 4", 4.0)})}
    return {**drawn, "whiskers": whiskers("accuracy", "Accuracy", ROWS, reference=0.5, percent=True)}


def test_only_logged_metrics_are_drawn() -> None:
    assert list(svgs()) == ["Reward", "KL from the SFT model", "Probability ratio", "Clip fraction", "whiskers"]
    assert stage("sft", {}) == []


def test_same_numbers_same_bytes_whatever_the_machine_s_style() -> None:
    first = svgs()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "pink", "svg.hashsalt": None}):
        assert svgs() == first


def test_colours_are_the_page_s() -> None:
    for title, svg in svgs().items():
        assert not re.findall(r"#[0-9a-fA-F]{3,6}\b(?![^<]*\))", re.sub(r'(url\(|href=")#[^")]*', "", svg)), title
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(INKS)
        assert "var(--text)" in svg or "var(--muted)" in svg
        assert "black" not in svg
        assert "<style" not in svg


def test_well_formed_and_named_for_a_screen_reader() -> None:
    ids: list[str] = []
    for svg in svgs().values():
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert root.get("width") is None
        assert root.get("viewBox") is not None
        ids += [element.get("id", "") for element in root.iter() if element.get("id")]
    assert ids
    assert len(ids) == len(set(ids))
    label = ET.fromstring(svgs()["KL from the SFT model"]).get("aria-label")
    assert label is not None
    assert "first 0, last 5.9, least 0, greatest 5.9" in label
    assert "A < B & C 58.0%" in str(ET.fromstring(svgs()["whiskers"]).get("aria-label"))


def test_target_is_drawn_and_named() -> None:
    svg = svgs()["KL from the SFT model"]
    assert "target 4" in svg
    assert "var(--limit)" in svg
    assert "var(--limit)" not in svgs()["Reward"]


def test_long_log_stays_small_and_keeps_its_mean() -> None:
    points = tuple((float(step), float(step % 10)) for step in range(100_000))
    short = thinned(points)
    assert len(short) == POINTS
    assert sum(y for _, y in short) / len(short) == pytest.approx(4.5)
    assert sum(x for x, _ in short) / len(short) == pytest.approx(49_999.5)
    (figure,) = stage("sft", {"loss": points})
    assert len(figure.svg) < 60_000
    assert figure.caption.endswith("; each point is the mean of 250 logged values.")
    assert figure.smooth


def test_running_mean_by_hand() -> None:
    # 60 points give a window of 3: in the middle (1 + 2 + 3) / 3, at the edge (0 + 1) / 2.
    window, smooth = running_mean(tuple((float(step), float(step)) for step in range(60)))
    assert window == 3
    assert smooth[2] == (2.0, 2.0)
    assert smooth[0] == (0.0, 0.5)
    assert smooth[59] == (59.0, 58.5)
    assert running_mean(((0.0, 1.0), (1.0, 5.0))) == (1, ((0.0, 1.0), (1.0, 5.0)))


def test_whisker_dot_lies_inside_its_interval() -> None:
    svg = whiskers("one", "One", [Interval("x", 0.6, 0.5, 0.8)], reference=None, percent=True)
    root = ET.fromstring(svg)
    paths = [str(e.get("d")) for e in root.iter() if e.tag.endswith("path") and "var(--accent)" in str(e.get("style"))]
    bar = next(path for path in paths if len(set(re.findall(r"[ML] ([\d.]+) ", path))) == 2)
    low, high = (float(x) for x in re.findall(r"[ML] ([\d.]+) ", bar))
    dot = next(float(str(e.get("x"))) for e in root.iter() if e.tag.endswith("use") and "accent" in str(e.get("style")))
    # The dot stands a third of the way: (0.6 - 0.5) / (0.8 - 0.5).
    assert (dot - low) / (high - low) == pytest.approx(1 / 3, abs=1e-4)


def test_the_reference_line_stands_beside_whiskers_and_not_in_their_words() -> None:
    rows = [Interval(f"A label of {name} that is long enough to pass over 0", 0.1, 0.0, 0.2) for name in "abc"]
    root = ET.fromstring(whiskers("three", "Three", rows, reference=0.0, percent=True, signed=True))
    dashed = [e for e in root.iter() if "stroke-dasharray" in str(e.get("style")) and "--muted" in str(e.get("style"))]
    spans = [sorted(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", str(e.get("d")))) for e in dashed]
    heights = [float(y) for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)", ET.tostring(root, encoding="unicode"))]
    texts = [
        float(str(e.get("y")))
        for e in root.iter()
        if e.tag.endswith("text") and "label" in "".join(e.itertext()) and e.get("y")
    ]
    assert len(spans) == 3
    for baseline in texts or heights[:0]:  # a word's height above its baseline is about 7 units
        assert not any(top < baseline - 1 and bottom > baseline - 7 for top, bottom in spans)
    assert texts


def test_what_a_rival_logs_is_drawn_where_it_was_logged() -> None:
    log: Log = dict.fromkeys(("kl_loss", "reward_scale", "reward_clipped"), ((1.0, 0.1), (2.0, 0.2)))
    assert [one.title for one in stage("ppo", log)] == ["KL loss", "Reward scale", "Cut rewards"]
    assert not any(one.main for one in stage("ppo", log))
    assert [one.title for one in stage("judge", {"length_slope": ((1.0, 0.1),)})] == ["Length slope"]


def test_one_point_constant_and_empty_logs() -> None:
    assert len(stage("reward", {"loss": ((1.0, 0.7),), "accuracy": ()})) == 1
    assert len(stage("reward", {"accuracy": tuple((float(i), 1.0) for i in range(50))})) == 1


def test_every_drawn_metric_is_in_the_glossary() -> None:
    glossary = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    for name, plots in PLOTS.items():
        for metric in [metric for plot in plots for metric, _, _ in plot.metrics]:
            assert f"`{metric}`" in glossary, f"{name}: {metric}"


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two #rrggbb colours (WCAG 2.2, relative luminance)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_light_and_dark() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    page = (ROOT / "src/stackllama/report/style.css").read_text("utf-8")
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*)\}", page)]
    assert len(themes) == 2
    for theme in themes:
        for ink in ("text", "muted", "accent", "second", "limit", "link"):
            for ground in ("page", "raised"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)


def test_labels_of_ticks_keep_the_digits_that_tell_them_apart() -> None:
    # Coordinates are cut to hundredths; a ratio's ticks at 0.985, 0.99, 0.995 and 1 are not.
    log: Log = {"ratio_mean": ((1.0, 1.0), (2.0, 0.984), (3.0, 0.996))}
    (drawn,) = stage("ppo", log)
    texts = [element.text or "" for element in ET.fromstring(drawn.svg).iter() if element.tag.endswith("text")]
    ticks = [text for text in texts if text.startswith(("0.9", "1.0"))]
    assert len(ticks) >= 3
    assert len(set(ticks)) == len(ticks)
    assert "0.985" in ticks or "0.990" in ticks
