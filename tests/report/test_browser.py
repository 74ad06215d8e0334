"""All pages in a real browser: nothing in its console, no request, every figure to be seen, and readable by all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.small_store import write as write_store
from tests.evaluate.test_audit import HOW
from tests.report import browser
from tests.report.test_ability import FOUND as LM_EVAL_FOUND
from tests.report.test_audit import found as audit
from tests.report.test_data_page import page_of
from tests.report.test_events import SKIPPED
from tests.report.test_judged import FOUND as JUDGED
from tests.report.test_page import write_run
from tests.report.test_rivals import make_run
from tests.report.test_watching import lines

from stackllama.evaluate.drift import spreads
from stackllama.files import digest_file
from stackllama.report import comparison_page
from stackllama.report.page import write_report
from stackllama.report.rivals import groups, read_rivals, several_seeds
from stackllama.run import LM_EVAL

pytest.importorskip("playwright.sync_api")
pytest.importorskip("axe_playwright_python")
pytestmark = [
    pytest.mark.skipif(browser.executable() is None, reason="no Chromium on this machine"),
    pytest.mark.xdist_group("browser"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that has everything: audit, watching with an alarm, guard events, drift, answers."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "whole")
    (folder / "reward" / "audit.json").write_text(json.dumps(audit()))
    (folder / "ppo" / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    with (folder / "ppo" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(SKIPPED) + "\n")
    scores = {"sft": np.linspace(-1, 1, 50), "ppo": np.linspace(0, 3, 50)}
    spread = {name: asdict(one) for name, one in spreads(np.linspace(-1, 1, 50), np.arange(50), scores, HOW).items()}
    (folder / "evaluate" / "drift.json").write_text(json.dumps({"reward": spread, "judge": spread}))
    samples = json.loads((folder / "evaluate" / "samples.json").read_text())
    for answer in samples[3]["answers"]:
        answer["judge"] = -answer["judge"]
    (folder / "evaluate" / "samples.json").write_text(json.dumps(samples))
    (folder / "evaluate" / LM_EVAL).write_text(json.dumps(LM_EVAL_FOUND))
    judged = JUDGED | {"samples": digest_file(folder / "evaluate" / "samples.json")}
    (folder / "asked").mkdir()
    (folder / "asked" / "judge.json").write_text(json.dumps(judged))
    return write_report(folder)


def test_the_report_of_a_run(chromium: Any, report: Path) -> None:
    page = report.read_text()
    for part in ("Audit", "Alarms", "Where their scores lie", "judge-7b", "General ability", "Samples"):
        assert part in page
    assert browser.faults(chromium, report) == []


def test_the_page_of_a_comparison(chromium: Any, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{seed}{advantage}", seed=seed, advantage=advantage, best_of=16 * (advantage == "gae"))
        for seed in (0, 1)
        for advantage in ("gae", "rloo")
    ]
    several = groups(read_rivals(runs))
    assert several_seeds(several)
    comparison_page.write_page(tmp_path / "page.html", several, None)
    assert browser.faults(chromium, tmp_path / "page.html") == []


def test_the_page_of_data(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page_of(write_store(tmp_path / "data")))
    assert browser.faults(chromium, tmp_path / "page.html") == []


def test_one_kind_of_samples_is_shown_alone(chromium: Any, report: Path) -> None:
    page = chromium.new_page()
    page.goto(report.as_uri())
    articles = page.locator("article")
    assert articles.count() == 10

    def seen() -> int:
        return sum(articles.nth(at).is_visible() for at in range(10))

    assert seen() == 10
    page.get_by_label("judge prefers SFT (1)").check()
    assert seen() == 1
    assert articles.nth(3).is_visible()
    page.keyboard.press("ArrowUp")  # radio buttons go by arrows: to "judge prefers PPO"
    assert seen() == 9
    page.get_by_label("all 10").check()
    assert seen() == 10


@pytest.mark.parametrize(
    ("inside", "fault"),
    [
        ("<script>console.log('here')</script>", "console: here"),
        ("<img src='http://127.0.0.1:9/x.png' alt='x'>", "request: http://127.0.0.1:9/x.png"),
        ("<p style='color: #bbb; background: #fff'>pale words</p>", "color-contrast"),
        (
            "<svg aria-label='gone' role='img' style='visibility: hidden' width='99' height='99'></svg>",
            "figure not seen",
        ),
        ("<div style='width: 3000px'>wide</div>", "wider than the screen"),
        ("<img src='data:,'>", "image-alt"),
    ],
)
def test_what_is_wrong_is_found(chromium: Any, tmp_path: Path, inside: str, fault: str) -> None:
    page = f"<!DOCTYPE html><html lang='en'><title>x</title><body><main><h1>x</h1>{inside}</main></body></html>"
    (tmp_path / "x.html").write_text(page)
    assert any(fault in one for one in browser.faults(chromium, tmp_path / "x.html"))
