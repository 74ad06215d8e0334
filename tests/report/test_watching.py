"""What was seen while PPO trained: every number that is drawn is in the file, and nothing is where nothing was."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stackllama.report.figures import Drawn, Log
from stackllama.report.page import write_report
from stackllama.report.reading import read_log
from stackllama.report.watching import MEASURES, SCORERS, figures_of, frontier

LIMITS = {"repetition": 0.1, "fences": 0.05, "length": 2.0, "perplexity": 2.0, "distance": 1.0}
RECIPE: dict[str, Any] = {"watch": {"kl_bound": 4.0, "limits": LIMITS}}
STEPS, KL = (0, 40, 80, 120, 160), (0.0, 1.1, 2.3, 3.2, 5.1)
CURVES = {
    "reward_gain": (0.0, 0.5, 0.9, 1.3, 1.8),
    "judge_gain": (0.0, 0.45, 0.7, 0.6, 0.31),
    "gold_gain": (0.0, 0.6, 0.85, 0.8, 0.75),
    "distance": (0.0, 0.05, 0.2, 0.7, 1.49),
    "length_ratio": (1.0, 1.2, 1.35, 1.7, 2.25),
    "perplexity_ratio": (1.0, 0.97, 0.9, 0.88, 0.86),
    "repetition_rise": (0.0, 0.004, 0.01, 0.03, 0.08),
    "fences_rise": (0.0, 0.0, 0.0, 0.0, 0.0),
}


def lines(*, gold: bool = True) -> list[dict[str, Any]]:
    found = []
    for at, (step, nats) in enumerate(zip(STEPS, KL, strict=True)):
        line: dict[str, Any] = {"step": step, "rounds": step // 4, "prompts": 128, "kl": nats}
        for name, values in CURVES.items():
            if gold or name != "gold_gain":
                line |= {
                    name: values[at],
                    f"{name}_low": values[at] - 0.05 * at,
                    f"{name}_high": values[at] + 0.04 * at,
                }
        found.append(line)
    found[-1]["alarms"] = "answers went from 17 to 38 tokens (limit: a factor of 2) <b>"
    return found


def write_log(folder: Path, *, gold: bool = True) -> Log:
    path = folder / "watch.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(gold=gold)), "utf-8")
    return read_log(path)[0]


def lines_drawn(drawn: Drawn) -> dict[str, list[list[tuple[float, float]]]]:
    """Ink -> the corners of each line that is stroked with it and not a marker, in the figure's units, y upwards."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for element in ET.fromstring(drawn.svg).iter():
        style = str(element.get("style"))
        ink = re.search(r"stroke: var\(--(\w+)\)", style)
        if element.tag.endswith("path") and ink and "fill: none" in style:
            corners = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", str(element.get("d")))
            found.setdefault(ink[1], []).append([(float(x), -float(y)) for x, y in corners])
    return found


def is_scaled(drawn: list[float], true: tuple[float, ...]) -> bool:
    """Whether coordinates are the numbers, shifted and stretched (an axis), to a hundredth of a unit or so."""
    slope, shift = np.polyfit(np.array(true), np.array(drawn), 1)
    return bool(slope > 0 and np.allclose(slope * np.array(true) + shift, drawn, atol=0.03))


def test_the_frontier_is_drawn_from_the_files_numbers(tmp_path: Path) -> None:
    drawn = frontier(write_log(tmp_path), bound=4.0, chosen=80)
    inks = lines_drawn(drawn)
    for metric, _, ink, _ in SCORERS:
        (curve,) = [line for line in inks[ink] if len(line) == len(STEPS)]
        assert is_scaled([x for x, _ in curve], KL), metric
        assert is_scaled([y for _, y in curve], CURVES[metric]), metric
    label = str(ET.fromstring(drawn.svg).get("aria-label"))
    assert "judge: +0.00 at 0.00 nats, +0.45 at 1.10 nats, +0.70 at 2.30 nats" in label
    assert "gold: +0.00 at 0.00 nats, +0.60" in label
    assert "var(--limit)" in drawn.svg
    assert "dashed upright: the bound of 4 nats" in drawn.caption
    assert "ringed" in drawn.caption


def test_without_gold_there_is_no_line_of_it(tmp_path: Path) -> None:
    drawn = frontier(write_log(tmp_path, gold=False), bound=None, chosen=None)
    assert "gold" not in drawn.svg
    assert "ringed" not in drawn.caption
    assert "bound" not in drawn.caption
    assert "bound" not in frontier(write_log(tmp_path), bound=50.0, chosen=None).caption  # far off the curves


def test_measures_are_drawn_from_the_files_numbers_with_their_limits(tmp_path: Path) -> None:
    first, *over_steps = figures_of(write_log(tmp_path), RECIPE, chosen=80)
    assert "the bound of 4 nats" in first.caption  # twice the target
    assert [one.title for one in over_steps] == [measure.title for measure in MEASURES]
    for drawn, measure in zip(over_steps, MEASURES, strict=True):
        curve = next(line for line in lines_drawn(drawn)["accent"] if len(line) == len(STEPS))
        assert is_scaled([x for x, _ in curve], tuple(map(float, STEPS))), measure
        if measure.metric != "fences_rise":
            assert is_scaled([y for _, y in curve], CURVES[measure.metric]), measure
        assert "Alarm where the whole band is beyond" in drawn.caption
    length = next(one for one in over_steps if one.title == "Length")
    assert "beyond 2, or below 0.5" in length.caption
    assert "var(--limit)" in length.svg
    off = {"ppo": {"watch": {"limits": dict.fromkeys(LIMITS)}}}
    assert not [one for one in figures_of(write_log(tmp_path), off, chosen=None)[1:] if "Alarm" in one.caption]


def test_same_numbers_same_bytes(tmp_path: Path) -> None:
    log = write_log(tmp_path)
    assert figures_of(log, RECIPE, chosen=80) == figures_of(log, RECIPE, chosen=80)
    assert figures_of({}, RECIPE, chosen=80) == []


def words(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "ppo").mkdir()
    (tmp_path / "summary.json").write_text(json.dumps({"ppo": {"kl": 2.0}}), "utf-8")
    return tmp_path


def test_the_page_shows_figures_choice_stop_and_alarms(run: Path) -> None:
    write_log(run / "ppo")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"name": "quickstart", **RECIPE}), "utf-8")
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    told = {"chosen_step": 80, "chosen_because": "the judge scores it highest", "stopped_because": "answers grew"}
    (run / "summary.json").write_text(json.dumps(summary | {"ppo": summary["ppo"] | told}), "utf-8")
    page = write_report(run).read_text("utf-8")
    text = re.sub(r"\s+", " ", words(page))
    assert "The policy has the weights of step 80: the judge scores it highest." in text
    assert "The training ended before its last batch: answers grew." in text
    assert "160 answers went from 17 to 38 tokens (limit: a factor of 2) <b>" in text
    assert "<b>" not in re.findall(r"factor of 2\) (.{3})", page)
    assert page.count('class="plot"') == 1 + len(MEASURES)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_says_nothing_where_nothing_was_watched(run: Path) -> None:
    page = write_report(run).read_text("utf-8")
    assert "held back from training" not in page
    assert "alarm" not in words(page)


def test_a_run_without_alarms_says_so(run: Path) -> None:
    write_log(run / "ppo")
    kept = [json.dumps(line) for line in lines()[:-1]]
    (run / "ppo" / "watch.jsonl").write_text("\n".join(kept) + '\n{"step": 160, "k', "utf-8")
    text = words(write_report(run).read_text("utf-8"))
    assert "No evaluation raised an alarm." in text
    assert "ppo/watch.jsonl: 1 unreadable line was skipped." in text
