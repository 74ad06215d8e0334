"""The audit on the page: every number of the file is there, and a file of another form does no harm."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from tests.evaluate.test_audit import HOW, QUESTIONS

from stackllama.evaluate.audit import audit
from stackllama.evaluate.preference import JudgedPair
from stackllama.evaluate.sensitivity import react
from stackllama.report.audit import audited, rules

BEFORE = [JudgedPair(at, 0, 1, float(at % 3), 1.0) for at in range(len(QUESTIONS))]
AFTER = [JudgedPair(at, 0, 1, float(at % 3) + 2, 1.0) for at in range(len(QUESTIONS))]


def found() -> dict[str, Any]:
    reaction = react(BEFORE, AFTER, HOW)
    assert reaction is not None
    numbers = asdict(audit(QUESTIONS, BEFORE, words=np.ones(len(QUESTIONS)), how=HOW))
    written = {"findings": ["One.", "<b>two"], **numbers, "reactions": {"cut to half": asdict(reaction)}}
    return dict(json.loads(json.dumps(written)))


def test_baselines_are_rows_of_two_figures() -> None:
    accuracies, overs = rules(found())
    assert [row.label for row in accuracies] == [
        "Baseline: the longer answer wins",
        "Baseline: the earlier answer wins",
        "Baseline: bag of words",
    ]
    assert accuracies[0].value == pytest.approx(0.6)
    assert accuracies[2].value == 1.0
    assert overs[2].value == pytest.approx(np.mean([one % 3 / 2 for one in range(200)]) - 1.0, abs=1e-9)


def test_the_page_has_findings_cuts_reliability_and_reactions() -> None:
    page = audited(found())
    assert page is not None
    assert page.findings == ["One.", "<b>two"]
    titles = [one.title for one in page.figures]
    assert titles == ["By score gap", "By length of the better answer over the worse", "By tag", "Reliability"]
    assert [one.main for one in page.figures] == [True, True, False, True]
    gap = page.figures[0]
    for label in ("1 (67 pairs)", "2 (67 pairs)", "3 (66 pairs)"):
        assert label in gap.svg
    assert "Expected calibration error" in page.figures[-1].caption
    assert page.reactions is not None
    (row,) = page.reactions.rows
    assert row[0] == "cut to half"
    # Half of the scores move by 2; their deviation is that of 0, 1, 2 in turn beside as many ones.
    spread = np.array([[one.better_score, one.worse_score] for one in BEFORE]).std()
    assert row[1].startswith(f"+{1 / spread:.2f} [")


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"findings": "text", "slices": [1], "calibration": 3, "baselines": {}, "reactions": []},
        {"slices": {"a": [{"pairs": 3, "accuracy": None}, 5], "b": 1}, "baselines": [None, {"label": 1}]},
        {"calibration": {"bins": [{"confidence": 0.5}, None]}, "reactions": {"x": {"shift": {"mean": 1}}}},
    ],
)
def test_a_file_of_another_form_gives_nothing(broken: dict[str, Any]) -> None:
    assert audited(broken) is None
    assert rules(broken) == ([], [])
