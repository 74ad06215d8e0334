"""What `stackllama lm-eval` found, as a table: the same one in a terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stackllama.report.reading import number
from stackllama.report.tables import Cells, Table
from stackllama.report.verdict import MINUS, show, span

DIGITS, LARGE = 3, 1e6
READING = (
    "Behind ± stands the standard error. An interval is of the paired difference, policy - SFT on the same documents: "
    "where it includes 0, no difference is shown. ↓: less is better."
)


def table(found: Mapping[str, Any], method: str) -> Table | None:
    """A row for each number of the file, the policy (by the name of its method) beside the SFT model; None where there
    is none. Tasks that a group sums up are left out, unless they were asked for.
    """
    rows = _shown(found)
    if not rows:
        return None
    with_policy = isinstance(found.get("policy"), str)
    level = f"{100 * (number(found, 'confidence') or 0.95):.3g}% interval"
    head = ("task", "metric", "documents", "SFT", *((method, "difference", level) if with_policy else ()))
    return Table("General ability", head, [_cells(row, with_policy=with_policy) for row in rows])


def remarks(found: Mapping[str, Any], lineage: Mapping[str, Any] | None = None) -> list[str]:
    """What a reader has to know of the table. lineage: of the run, which tells whether its weights are still those."""
    said = [READING]
    limit, hidden = number(found, "limit"), len(_rows(found)) - len(_shown(found))
    if limit is not None:
        said.append(f"Of each task only the first {limit:.0f} documents were read: no number to compare with others'.")
    if hidden:
        said.append(f"{hidden} more are in evaluate/lm_eval.json: of the tasks that the groups sum up.")
    weights = found.get("weights")
    if lineage is not None and isinstance(weights, Mapping):
        changed = [stage for stage, made in weights.items() if _outputs(lineage, stage) != made]
        if changed:
            said.append(
                f"The weights of {' and '.join(map(str, changed))} have changed since: give the command again to "
                "measure those that are there now."
            )
    return said


def version(found: Mapping[str, Any]) -> str:
    """The harness's version, as far as it is told."""
    told = found.get("lm_eval")
    return told if isinstance(told, str) else ""


def _rows(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = found.get("rows")
    listed = rows if isinstance(rows, list) else []
    return [row for row in listed if isinstance(row, Mapping) and isinstance(row.get("task"), str)]


def _shown(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    asked = found.get("tasks")
    named: Sequence[Any] = asked if isinstance(asked, list) else ()
    return [row for row in _rows(found) if row.get("part_of") is None or row["task"] in named]


def _cells(row: Mapping[str, Any], *, with_policy: bool) -> Cells:
    values = [_value(row, "sft")]
    if with_policy:
        low, high = (number(row, f"difference_{end}") for end in ("low", "high"))
        change = _number(number(row, "difference"), signed=True)
        values += [_value(row, "policy"), change, span(low, high, DIGITS, signed=True)]
    return (row["task"], _metric(row), show(number(row, "documents"), 0), *values)


def _metric(row: Mapping[str, Any]) -> str:
    name, kind = (str(row.get(key) or "") for key in ("metric", "filter"))
    less = " ↓" if row.get("higher_is_better") is False else ""
    return f"{name}{less}" if kind in ("", "none") else f"{name}{less} ({kind})"


def _value(row: Mapping[str, Any], name: str) -> str:
    value, error = number(row, name), number(row, f"{name}_stderr")
    return _number(value) if error is None else f"{_number(value)} ± {_number(error)}"


def _number(value: float | None, *, signed: bool = False) -> str:
    """Perplexities of a word may be of any size."""
    if value is not None and abs(value) >= LARGE:
        return f"{value:{'+' if signed else ''}.3g}".replace("-", MINUS)
    return show(value, DIGITS, signed=signed)


def _outputs(lineage: Mapping[str, Any], stage: Any) -> Any:
    stages = lineage.get("stages")
    record = stages.get(stage) if isinstance(stages, Mapping) else None
    return record.get("outputs") if isinstance(record, Mapping) else None
