"""The page of a comparison: stands alone, shows every run, gives the same bytes, survives a hostile name."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.report.test_rivals import make_run

from stackllama.report.comparison_page import render, write_page
from stackllama.report.rivals import groups, read_rivals


def test_the_page_shows_tables_and_a_frontier_for_each_score(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "s0-ppo", best_of=16),
        make_run(tmp_path / "s0-rloo", advantage="rloo", up_to=2),
        make_run(tmp_path / "<b>s1", seed=1),
    ]
    several = groups(read_rivals(folders))
    write_page(tmp_path / "page.html", several, None)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page == render(several, None)
    assert page.count('class="plot"') == 2 * 4  # win rates, reward, judge, gold, in each of two groups
    assert "<script" not in page
    assert "<b>s1" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page.replace("xlink:href", "xlink"))
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))
    assert "the same journey under different seeds" in text
    assert "Over seeds Each seed is a journey of its own" in text
    assert "reached 1.00 nats at most" in text
    assert "At 1.84 nats" in text
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    judge = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if 'aria-label="Judge over KL' in svg)
    label = str(ET.fromstring(judge).get("aria-label"))
    assert "s0-ppo: +0.00 at 0.00 nats, +0.50 at 1.00 nats, +1.00 at 2.00 nats" in label
    assert "s0-rloo: +0.00 at 0.00 nats, +0.50 at 1.00 nats;" in label
    assert "best of 16: +0.50 at 1.84 nats" in label


def test_runs_without_a_curve_have_their_exam(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "ppo" / "watch.jsonl").unlink()
    page = render(groups(read_rivals([run])), None)
    assert page.count('class="plot"') == 1
    assert "without a curve over KL: a." in page


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(tmp_path: Path) -> None:
    page = render(groups(read_rivals([make_run(tmp_path / "_a"), make_run(tmp_path / "b")])), None)
    judge = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if 'aria-label="Judge over KL' in svg)
    text = " ".join(ET.fromstring(judge).itertext())
    assert "_a (PPO)" in text
    assert "b (PPO)" in text
