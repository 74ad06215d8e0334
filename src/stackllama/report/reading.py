"""What a run folder holds, as the report reads it.

Reading forgives what a killed process leaves (a torn line, a stage without its files) and nothing else: a broken file
is named, so that no page is made from half of the truth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stackllama.errors import RunError
from stackllama.files import digest_file
from stackllama.run import LM_EVAL
from stackllama.summary import FILE, read_summary

if TYPE_CHECKING:
    from stackllama.report.figures import Log  # it draws: seconds of imports

STAGES = ("sft", "reward", "judge", "ppo", "dpo")
"""Stages with a `metrics.jsonl`."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says; a file that is not there gives an empty value. `endpoint`: what a judge behind an address
    said of the exam's answers; `events`: the lines of each stage's log that tell what the guard did; `torn`: unreadable
    lines of each file; `watch`: what was seen while the policy was trained, and `alarms` the (step, reasons) of it.
    """

    name: str
    summary: Mapping[str, Any]
    recipe: Mapping[str, Any]
    lineage: Mapping[str, Any]
    data: Mapping[str, Any]
    policy: Mapping[str, Any]
    drift: Mapping[str, Any]
    audit: Mapping[str, Any]
    ability: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    endpoint: Mapping[str, Any]
    logs: Mapping[str, Log]
    events: Mapping[str, Sequence[Mapping[str, Any]]]
    torn: Mapping[str, int]
    watch: Log
    alarms: Sequence[tuple[float, str]]


def read_run(folder: Path) -> Run:
    """Read `summary.json`, `recipe.yaml`, `lineage.json`, `data/report.json`, STAGE/`metrics.jsonl`,
    `reward/audit.json`, POLICY'S STAGE/`watch.jsonl`, `evaluate/*.json`, `asked/judge.json`.

    Raises RunError where the folder is missing or empty of results, or a file other than a log is broken.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a run folder; give the folder of a run, such as runs/quickstart")
    logs, events, torn = {}, {}, {}
    for stage in STAGES:
        events[stage] = read_events(folder / stage / "metrics.jsonl")
        logs[stage], skipped = read_log(folder / stage / "metrics.jsonl")
        if skipped:
            torn[f"{stage}/metrics.jsonl"] = skipped
    recipe = _read(folder / "recipe.yaml", dict)
    log = f"{policy_stage(recipe)}/watch.jsonl"
    watch, skipped = read_log(folder / log)
    if skipped:
        torn[log] = skipped
    samples = _read(folder / "evaluate" / "samples.json", list)
    run = Run(
        name=folder.resolve().name,
        summary=_summary(folder),
        recipe=recipe,
        lineage=_read(folder / "lineage.json", dict),
        data=_read(folder / "data" / "report.json", dict),
        policy=_read(folder / "evaluate" / "policy.json", dict),
        drift=_read(folder / "evaluate" / "drift.json", dict),
        audit=_read(folder / "reward" / "audit.json", dict),
        endpoint=_endpoint(folder),
        ability=_read(folder / "evaluate" / LM_EVAL, dict),
        samples=[sample for sample in samples if isinstance(sample, dict)],
        logs=logs,
        events=events,
        torn=torn,
        watch=watch,
        alarms=read_texts(folder / log, "alarms"),
    )
    if not (run.summary or run.data or any(run.logs.values())):
        raise RunError(f"{folder} has no summary.json, no data report and no metrics; run a stage in it first")
    return run


def read_log(path: Path) -> tuple[Log, int]:
    """(metric to its points, number of unreadable lines) of a JSON-lines log.

    A killed process leaves a torn last line, and a resumed one writes some steps again: unreadable lines are skipped
    and counted, and the last value of a step holds. Values that are not finite numbers are left out.
    """
    columns: dict[str, dict[float, float]] = {}
    rows, skipped = _rows(path)
    for step, row in rows:
        for metric in row:
            value = number(row, metric)
            if metric != "step" and value is not None:
                columns.setdefault(str(metric), {})[step] = value
    return {metric: tuple(sorted(points.items())) for metric, points in columns.items()}, skipped


def read_texts(path: Path, name: str) -> tuple[tuple[float, str], ...]:
    """(step, text) of each line of a log that has a text under that name, the last of a step."""
    found = {step: row[name] for step, row in _rows(path)[0] if isinstance(row.get(name), str)}
    return tuple(sorted(found.items()))


def _rows(path: Path) -> tuple[list[tuple[float, dict[str, Any]]], int]:
    """(step, line) of each readable line of a log, and how many there were that are not."""
    rows, skipped = [], 0
    lines = path.read_bytes().decode("utf-8", "replace").splitlines() if path.is_file() else []
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        step = number(row, "step") if isinstance(row, dict) else None
        if step is None:
            skipped += 1
        else:
            rows.append((step, row))
    return rows, skipped


def read_events(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a JSON-lines log in which the guard acted, by step; the last one of a step holds."""
    found = dict(_rows(path)[0])
    return [row for _, row in sorted(found.items()) if isinstance(row.get("guard"), str)]


def number(tree: Any, *keys: str) -> float | None:
    """The finite number at `keys` in nested mappings, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if isinstance(tree, bool) or not isinstance(tree, (int, float)):
        return None
    try:
        value = float(tree)
    except OverflowError:  # an integer beyond what a float holds
        return None
    return value if math.isfinite(value) else None


_ADVANTAGES = {
    "gae": "PPO",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "reinforce": "REINFORCE",
    "best": "rejection sampling",
}
METHODS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "ppo": ("advantage", "PPO", _ADVANTAGES),
    "dpo": ("loss", "DPO", {"dpo": "DPO", "ipo": "IPO"}),
}
"""Stage that makes the policy -> the key of its section that tells the method, the method without it, the others."""


def policy_stage(recipe: Mapping[str, Any]) -> str:
    """The stage that makes the policy; `ppo` where nothing is said."""
    stage = recipe.get("policy")
    return stage if isinstance(stage, str) and stage in METHODS else "ppo"


def policy_method(recipe: Mapping[str, Any]) -> str:
    """What readers call the method that made the policy, such as `PPO`, `RLOO` or `DPO`; PPO where nothing is said."""
    stage = policy_stage(recipe)
    section, (key, usual, names) = recipe.get(stage), METHODS[stage]
    told = section.get(key) if isinstance(section, Mapping) else None
    return names.get(told, usual) if isinstance(told, str) else usual


def kl_target(run: Run) -> float | None:
    """The target of an adaptive KL controller, in nats; None where the recipe names none, fixes the coefficient, or
    makes its policy without one.
    """
    if policy_stage(run.recipe) != "ppo":
        return None
    ppo = run.recipe.get("ppo")
    control = ppo.get("kl") if isinstance(ppo, Mapping) else None
    if isinstance(control, Mapping) and control.get("controller") == "fixed":
        return None
    return number(control, "target")


def coverage(run: Run) -> str:
    """The coverage of the run's intervals, such as `95%`."""
    known = number(run.summary, "confidence") or number(run.recipe, "evaluate", "confidence")
    return f"{100 * (known or 0.95):.3g}%"


def _summary(folder: Path) -> dict[str, Any]:
    """The summary as it stands in the file; RunError where that does not fit the schema."""
    summary: dict[str, Any] = _read(folder / FILE, dict)
    read_summary(folder)
    return summary


def _endpoint(folder: Path) -> dict[str, Any]:
    """What a judge said of the answers that are there; empty where it spoke of others, of an exam before this one."""
    found: dict[str, Any] = _read(folder / "asked" / "judge.json", dict)
    samples = folder / "evaluate" / "samples.json"
    return found if samples.is_file() and found.get("samples") == digest_file(samples) else {}


def _read(path: Path, kind: type) -> Any:
    """A JSON or YAML file that holds a `kind`, an empty one where there is no file; RunError where it is broken."""
    if not path.is_file():
        return kind()
    try:
        text = path.read_text("utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read ({error}); run its stage again, or remove the file") from error
    if not isinstance(value, kind):
        raise RunError(
            f"{path} holds a {type(value).__name__}, not a {kind.__name__}; run its stage again, or remove the file"
        )
    return value
