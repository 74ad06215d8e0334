"""What the guard did in a run, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stackllama.report.reading import number
from stackllama.report.verdict import DASH

MOST_ROWS = 50
"""Events that are shown; all of them stand in the stages' metrics.jsonl."""

Row = tuple[str, str, str, str, str, str]


def rows(events: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[Row], int]:
    """((stage, step, number, its value, the usual one and the limit, what was done) of each event, how many are left
    out). Stages in their order, each one's steps too.
    """
    found = [_row(stage, event) for stage, several in events.items() for event in several]
    return found[:MOST_ROWS], max(0, len(found) - MOST_ROWS)


def _row(stage: str, event: Mapping[str, Any]) -> Row:
    metric = event.get("guard_metric")
    what = metric.replace("_", " ") if isinstance(metric, str) else DASH
    return stage, f"{number(event, 'step'):g}", what, _value(event), _range(event), _action(event)


def _value(event: Mapping[str, Any]) -> str:
    """The number; one that is not finite stands as a word in the log."""
    value = number(event, "guard_value")
    if value is not None:
        return f"{value:.3g}"
    word = event.get("guard_value")
    return word if isinstance(word, str) else DASH


def _range(event: Mapping[str, Any]) -> str:
    usual, limit = number(event, "guard_usual"), number(event, "guard_limit")
    parts = [] if usual is None else [f"usually {usual:.3g}"]
    return ", ".join(parts if limit is None else [*parts, f"limit {limit:.3g}"]) or DASH


def _action(event: Mapping[str, Any]) -> str:
    action, target = str(event["guard"]), number(event, "rewound_to")
    if target is not None:
        return f"{action} to step {target:g}"
    reason = event.get("skipped")
    return f"{action}: {reason}" if event.get("guard_metric") is None and isinstance(reason, str) else action
