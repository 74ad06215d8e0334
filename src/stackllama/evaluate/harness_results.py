"""What the lm-evaluation-harness found of two models, side by side: a row for each task, metric and filter.

The harness gives a value and its standard error for each model alone. Both models saw the same documents, so their
difference is known better than that: where a metric is the mean of what each document got, documents are resampled and
the difference is paired.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stackllama.evaluate.statistics import Interval, Resampling, paired_difference

Found = Mapping[str, Any]
"""What `lm_eval.evaluate` gives, its samples included."""
Row = dict[str, Any]
Document = tuple[str, int, str]
"""Task, number of the document, and a hash of what the model was shown of it."""

STDERR = "_stderr"


def side_by_side(sft: Found, policy: Found | None, how: Resampling) -> list[Row]:
    """A row for each number of the SFT model, with the policy's beside it where there is one.

    A row has `task`, `metric`, `filter`, `documents`, `shots`, `higher_is_better`, `part_of` (the group that sums the
    number up), and of each model the value and `_stderr`; then `difference` (policy - SFT) with the ends of its
    interval. What is not known is None.
    """
    groups = sft.get("group_subtasks", {})
    parent = {(child, number): name for name in groups for child in groups[name] for number in _numbers(sft, name)}
    rows = []
    for task in sft["results"]:
        for metric, kind in _numbers(sft, task):
            row: Row = {
                "task": task,
                "metric": metric,
                "filter": kind,
                "part_of": parent.get((task, (metric, kind))),
                "documents": _documents(sft, task, metric, kind),
                "shots": sft.get("n-shot", {}).get(task),
                "higher_is_better": (sft.get("higher_is_better", {}).get(task) or {}).get(metric),
                **_value(sft, task, metric, kind, "sft"),
            }
            if policy is not None:
                row |= _value(policy, task, metric, kind, "policy")
                row |= _difference(row, _paired(sft, policy, task, metric, kind, how))
            rows.append(row)
    return rows


def _numbers(found: Found, task: str) -> Iterator[tuple[str, str]]:
    """(metric, filter) of the numbers of a task."""
    for key in found["results"].get(task, {}):
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith(STDERR):
            yield metric, kind


def _value(found: Found, task: str, metric: str, kind: str, name: str) -> Row:
    numbers = found["results"].get(task, {})
    value, error = numbers.get(f"{metric},{kind}"), numbers.get(f"{metric}{STDERR},{kind}")
    return {name: _finite(value), f"{name}{STDERR}": _finite(error)}


def _finite(value: Any) -> float | None:
    """A number as JSON can have it; the harness writes "N/A" where it has none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        return None
    return float(value)


def _difference(row: Row, paired: Interval | None) -> Row:
    sft, policy = row["sft"], row["policy"]
    return {
        "difference": None if sft is None or policy is None else policy - sft,
        "difference_low": None if paired is None else paired.low,
        "difference_high": None if paired is None else paired.high,
    }


def _paired(sft: Found, policy: Found, task: str, metric: str, kind: str, how: Resampling) -> Interval | None:
    """The interval of policy - SFT over documents; None where one of the numbers is not the mean over them, or the
    models were not shown the same.
    """
    before, after = (_by_document(found, task, metric, kind) for found in (sft, policy))
    if before is None or after is None or before.keys() != after.keys() or len(before) < 2:
        return None
    return paired_difference([after[one] for one in before], list(before.values()), **how)


def _by_document(found: Found, task: str, metric: str, kind: str) -> dict[Document, float] | None:
    """What each document of a task, or of all tasks of a group, got; None where that is no number, or the task's number
    is another one than their mean.
    """
    values: dict[Document, float] = {}
    for leaf in _leaves(found, task):
        for sample in found.get("samples", {}).get(leaf, ()):
            if sample.get("filter") != kind or metric not in sample:
                continue  # not every task of a group has every metric
            value = sample[metric]
            value = float(value) if isinstance(value, bool | np.bool_) else _finite(value)
            if value is None:
                return None
            values[leaf, sample["doc_id"], f"{sample.get('doc_hash')} {sample.get('prompt_hash')}"] = value
    told = _finite(found["results"][task].get(f"{metric},{kind}"))
    if not values or told is None or not math.isclose(told, sum(values.values()) / len(values), abs_tol=1e-9):
        return None
    return values


def _leaves(found: Found, task: str) -> list[str]:
    """The tasks with documents of a group, or the task itself."""
    children = found.get("group_subtasks", {}).get(task)
    if not children:
        return [task]
    return list(dict.fromkeys(leaf for child in children for leaf in _leaves(found, child)))


def _documents(found: Found, task: str, metric: str, kind: str) -> int | None:
    """How many documents were read of a task, or of those tasks of a group that have the metric."""
    leaves = [leaf for leaf in _leaves(found, task) if (metric, kind) in _numbers(found, leaf)]
    counts = [found.get("n-samples", {}).get(leaf, {}).get("effective") for leaf in leaves]
    return None if None in counts else sum(counts)
