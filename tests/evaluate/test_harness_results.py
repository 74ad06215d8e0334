"""Two results of the harness side by side: what is paired, what cannot be, and groups."""

from __future__ import annotations

from typing import Any

import pytest

from stackllama.evaluate.harness_results import side_by_side
from stackllama.evaluate.statistics import Resampling, paired_difference

HOW = Resampling(resamples=200, confidence=0.9, seed=0)


def found(**given: list[float]) -> dict[str, Any]:
    """What the harness gives for tasks whose documents got these numbers as `acc`."""
    results: dict[str, Any] = {
        task: {"alias": task, "sample_len": len(acc), "acc,none": sum(acc) / len(acc), "acc_stderr,none": 0.125}
        for task, acc in given.items()
    }
    return {
        "results": results,
        "group_subtasks": {},
        "n-shot": dict.fromkeys(given, 5),
        "n-samples": {task: {"original": 1000, "effective": len(acc)} for task, acc in given.items()},
        "higher_is_better": {task: {"acc": True} for task in given},
        "samples": {
            task: [
                {"doc_id": at, "doc_hash": f"d{at}", "prompt_hash": f"p{at}", "filter": "none", "acc": one}
                for at, one in enumerate(acc)
            ]
            for task, acc in given.items()
        },
    }


SFT, POLICY = found(a=[1.0, 0.0, 1.0, 1.0]), found(a=[1.0, 1.0, 0.0, 1.0])


def test_a_mean_over_documents_is_compared_by_document() -> None:
    (row,) = side_by_side(SFT, found(a=[1.0, 1.0, 1.0, 1.0]), HOW)
    expected = paired_difference([1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], **HOW)
    assert row == {
        "task": "a",
        "metric": "acc",
        "filter": "none",
        "part_of": None,
        "documents": 4,
        "shots": 5,
        "higher_is_better": True,
        "sft": 0.75,
        "sft_stderr": 0.125,
        "policy": 1.0,
        "policy_stderr": 0.125,
        "difference": 0.25,
        "difference_low": expected.low,
        "difference_high": expected.high,
    }


def test_documents_are_paired_whatever_their_order() -> None:
    shuffled = {**POLICY, "samples": {"a": POLICY["samples"]["a"][::-1]}}
    assert side_by_side(SFT, shuffled, HOW) == side_by_side(SFT, POLICY, HOW)
    same = {**SFT, "samples": {"a": SFT["samples"]["a"][::-1]}}
    (row,) = side_by_side(SFT, same, HOW)
    assert (row["difference"], row["difference_low"], row["difference_high"]) == (0.0, 0.0, 0.0)


def change(result: dict[str, Any], at: int, **values: Any) -> dict[str, Any]:
    samples = [dict(one) for one in result["samples"]["a"]]
    samples[at] |= values
    return {**result, "samples": {"a": samples}}


@pytest.mark.parametrize(
    "policy",
    [
        {**POLICY, "samples": {}},
        change(POLICY, 0, prompt_hash="other examples"),
        change(POLICY, 0, acc=(1.0, 2.0)),
        change(POLICY, 0, acc=0.0),  # the number of the task is another one than the mean
        change(POLICY, 0, filter="strict"),
    ],
)
def test_without_the_same_documents_or_a_plain_mean_there_is_no_interval(policy: dict[str, Any]) -> None:
    (row,) = side_by_side(SFT, policy, HOW)
    assert row["difference"] == 0.0
    assert row["difference_low"] is None
    assert row["difference_high"] is None


def test_a_single_document_has_no_interval() -> None:
    (row,) = side_by_side(found(a=[1.0]), found(a=[0.0]), HOW)
    assert (row["difference"], row["difference_low"]) == (-1.0, None)


def test_what_the_harness_does_not_know_is_none() -> None:
    odd = found(a=[1.0, 0.0])
    odd["results"]["a"] |= {"acc,none": float("nan"), "acc_stderr,none": "N/A"}
    (row,) = side_by_side(odd, SFT, HOW)
    assert [row[key] for key in ("sft", "sft_stderr", "policy", "difference", "difference_low")] == [
        None,
        None,
        0.75,
        None,
        None,
    ]


def test_without_a_policy_its_columns_are_missing() -> None:
    (row,) = side_by_side(SFT, None, HOW)
    assert not [key for key in row if key.startswith(("policy", "difference"))]


def grouped(**given: list[float]) -> dict[str, Any]:
    result = found(**given)
    every = [one for acc in given.values() for one in acc]
    result["results"]["all"] = {"alias": "all", "acc,none": sum(every) / len(every), "acc_stderr,none": 0.1}
    result["group_subtasks"] = {"all": ["inner", "c"], "inner": ["a", "b"]}
    result["results"]["inner"] = {"alias": "inner"}
    return result


def test_a_group_pools_the_documents_of_its_tasks() -> None:
    sft = grouped(a=[1.0, 0.0], b=[0.0, 0.0, 1.0], c=[1.0])
    policy = grouped(a=[1.0, 1.0], b=[0.0, 0.0, 0.0], c=[1.0])
    rows = {row["task"]: row for row in side_by_side(sft, policy, HOW)}
    assert set(rows) == {"a", "b", "c", "all"}
    assert {task: row["part_of"] for task, row in rows.items()} == {"a": None, "b": None, "c": "all", "all": None}
    expected = paired_difference([1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 1], **HOW)
    assert rows["all"]["documents"] == 6
    assert (rows["all"]["difference_low"], rows["all"]["difference_high"]) == (expected.low, expected.high)
    # A mean of means over tasks of different sizes is no mean over documents.
    for result in (sft, policy):
        result["results"]["all"]["acc,none"] = 0.61
    (row,) = [row for row in side_by_side(sft, policy, HOW) if row["task"] == "all"]
    assert row["difference_low"] is None


def test_a_group_sums_up_only_what_it_has_of_only_those_tasks_that_have_it() -> None:
    sft, policy = (grouped(a=[1.0, 0.0], b=[0.0, after, 1.0], c=[1.0]) for after in (0.0, 1.0))
    for result in (sft, policy):  # c is judged by another measure
        result["results"]["c"] = {"exact,strict": 1.0}
        result["samples"]["c"] = [
            {**one, "filter": "strict", "exact": one.pop("acc")} for one in result["samples"]["c"]
        ]
        result["results"]["all"]["acc,none"] = sum(one["acc"] for task in "ab" for one in result["samples"][task]) / 5
    rows = {row["task"]: row for row in side_by_side(sft, policy, HOW)}
    assert (rows["c"]["part_of"], rows["c"]["metric"], rows["c"]["documents"]) == (None, "exact", 1)
    assert rows["all"]["documents"] == 5
    assert rows["all"]["difference_high"] > rows["all"]["difference"] == pytest.approx(0.2)
