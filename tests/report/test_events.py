"""The table of what the guard did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stackllama.report import events
from stackllama.report.page import write_report

SKIPPED: dict[str, Any] = {
    "step": 81,
    "loss": 61.25,
    "guard": "skipped",
    "guard_metric": "gradient_norm",
    "guard_value": 61.25,
    "guard_usual": 0.6125,
    "guard_limit": 1.5,
    "skipped": "gradient_norm 61.2 is far from the usual 0.613 (the limit is 1.5)",
}


@pytest.mark.parametrize(
    ("event", "row"),
    [
        (SKIPPED, ("sft", "81", "gradient norm", "61.2", "usually 0.613, limit 1.5", "skipped")),
        (
            {"step": 3, "guard": "skipped", "guard_metric": "loss", "guard_value": "NaN", "skipped": "loss is nan"},
            ("sft", "3", "loss", "NaN", "\N{EN DASH}", "skipped"),
        ),
        (
            {**SKIPPED, "guard": "rewound", "rewound_to": 50},
            ("sft", "81", "gradient norm", "61.2", "usually 0.613, limit 1.5", "rewound to step 50"),
        ),
        (
            {"step": 9, "loss": "NaN", "guard": "passed over", "skipped": "the reward did not vary: all 1"},
            ("sft", "9", *["\N{EN DASH}"] * 3, "passed over: the reward did not vary: all 1"),
        ),
        (
            {"step": 9, "guard": "clipped", "guard_metric": 7, "guard_value": [], "guard_usual": None},
            ("sft", "9", *["\N{EN DASH}"] * 3, "clipped"),
        ),
    ],
)
def test_an_event_is_told_in_words(event: dict[str, Any], row: tuple[str, ...]) -> None:
    assert events.rows({"sft": [event]}) == ([row], 0)


def test_long_lists_are_cut_and_stages_keep_their_order() -> None:
    found, left = events.rows({"sft": [SKIPPED] * 2, "reward": [], "ppo": [SKIPPED] * 60})
    assert [row[0] for row in found] == ["sft"] * 2 + ["ppo"] * 48
    assert left == 12


def page_of(folder: Path, *lines: dict[str, Any]) -> str:
    (folder / "ppo").mkdir(exist_ok=True)
    (folder / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return write_report(folder).read_text("utf-8")


def test_the_page_shows_what_happened_and_nothing_where_nothing_did(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"step": 1, "loss": 0.5}, SKIPPED)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "ppo 81 gradient norm 61.2 usually 0.613, limit 1.5 skipped" in text
    assert 'href="#guard"' in page
    assert page.index('id="policy"') < page.index('id="guard"') < page.index('id="evaluation"')
    clean = page_of(tmp_path, {"step": 1, "loss": 0.5})
    assert "guard" not in clean.split("</style>")[1]


def test_a_reason_in_a_log_cannot_become_markup(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"step": 1, "round": 0.0, "guard": "passed over", "skipped": "<script>alert(1)</script>"})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
