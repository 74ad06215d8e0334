"""SFT model, best-of-n and the policies of several runs side by side: rows of numbers, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stackllama.report.equal_kl import MEASURES, at_kl, most
from stackllama.report.reading import number
from stackllama.report.rivals import SHARED, Group, Rival, differs, several_seeds
from stackllama.report.tables import Table
from stackllama.report.verdict import DASH, show

Numbers = dict[str, Any]

NEAR = 0.01
"""Nats by which a KL may be off best-of-n's bound and best-of-n still stand beside the others: it was typed rounded."""

_ENDS = ("", "_low", "_high")
_POLICY_NUMBERS = ("reward", "judge", "gold", "length", "eos_rate", "repetition", "distinct_2")
_GAINS = tuple(f"{measure}_gain{end}" for measure in MEASURES for end in _ENDS)


def to_json(several: Sequence[Group], kl: float | None) -> dict[str, Any]:
    """Everything that is shown, and more digits; `kl`: where to compare, in nats, None for each group's own choice."""
    found = []
    for group in several:
        where = group.kl() if kl is None else kl
        found.append(
            {
                "runs": [rival.name for rival in group.rivals],
                "stands_on": dict(group.stands_on),
                "rows": rows(group),
                "at_kl": None if where is None else {"kl": where, "rows": rows_at(group, where)},
            }
        )
    return {"differs_in": differs(several), "groups": found}


def rows(group: Group) -> list[Numbers]:
    """The exam's numbers: of the SFT model, of each best-of-n, of each run's policy. What is not known is left out."""
    first = group.rivals[0]
    found = [{"name": "SFT", "method": "SFT", "kl": 0.0, **_policy(first, "sft")}]
    found += [_best_of(rival, n) for n, rival in group.best_of.items()]
    found += [_run(rival) for rival in group.rivals]
    return [{key: value for key, value in row.items() if value is not None} for row in found]


def rows_at(group: Group, nats: float) -> list[Numbers]:
    """What each run's policy had gained when its training was last at a KL, on the prompts that it was watched on.

    `reached` is false for a run that never was there; `most` is then the highest KL that it had, in nats. A best-of-n
    whose bound is there stands above them, with what the exam measured.
    """
    found: list[Numbers] = []
    for n, rival in group.best_of.items():
        bound = number(rival.run.summary, "best_of", "kl_bound")
        gains = {key: number(rival.run.policy, "best_of", key) for key in _GAINS}
        if bound is not None and abs(bound - nats) <= NEAR and any(value is not None for value in gains.values()):
            known = {key: value for key, value in gains.items() if value is not None}
            found.append({"name": f"best of {n}", "method": "best-of-n", "reached": True, "kl_bound": bound, **known})
    for rival in group.rivals:
        reached = at_kl(rival.log, nats)
        numbers = {"most": most(rival.log)} if reached is None else {"step": reached.step, **reached.numbers}
        found.append({"name": rival.name, "method": rival.method, "reached": reached is not None, **numbers})
    return found


def shown(several: Sequence[Group], kl: float | None) -> list[tuple[Group, Table, Table | None, float | None]]:
    """(group, table of the exam, table at equal KL, where that is in nats) of each group."""
    found = []
    for group in several:
        where = group.kl() if kl is None else kl
        found.append((group, exam_table(group), None if where is None else kl_table(group, where), where))
    return found


def remarks(several: Sequence[Group]) -> list[str]:
    """What a reader has to know before comparing."""
    said = []
    if several_seeds(several):
        said.append(
            f"The {len(several)} groups are the same journey under different seeds: compare within each, and over "
            "all of them by the tables over seeds."
        )
    elif len(several) > 1:
        parts = differs(several)
        said.append(
            f"The runs do not all stand on the same: they differ in {', '.join(parts)}. They are shown in "
            f"{len(several)} groups; compare within a group only."
        )
    for group in several:
        watched = {rival.name: int(asked[-1][1]) for rival in group.rivals if (asked := rival.log.get("prompts"))}
        if len(set(watched.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in watched.items())
            said.append(
                f"The curves over KL are of different numbers of prompts held back, so not of the same: {counts}."
            )
    torn = [
        f"{rival.name} ({count} line{'' if count == 1 else 's'} of {log})"
        for group in several
        for rival in group.rivals
        if (count := rival.run.torn.get(log := f"{rival.stage}/watch.jsonl"))
    ]
    if torn:
        said.append(f"Evaluations that cannot be read are missing from the curves over KL: {', '.join(torn)}.")
    bare = [rival.name for group in several for rival in group.rivals if not rival.log.get("kl")]
    if bare:
        said.append(f"Not watched while they were trained, so without a curve over KL: {', '.join(bare)}.")
    return said


def title(group: Group, several: Sequence[Group]) -> str:
    """What a group's table is called."""
    if len(several) == 1:
        return "On held-out questions"
    seeds = sorted({rival.seed for rival in group.rivals})
    return f"On held-out questions, group {several.index(group) + 1} (seed {', '.join(map(str, seeds))})"


def exam_table(group: Group) -> Table:
    """The exam as a table; intervals stand in brackets."""
    given = rows(group)
    gold = any("gold" in row for row in given)
    head = ["", "method", "reward", "judge wins", *(["gold", "gold over SFT"] if gold else [])]
    head += ["KL", "length", "ended", "steps", "seconds"]
    cells = []
    for row in given:
        kl = f"≤ {show(row['kl_bound'])}" if "kl_bound" in row else show(row.get("kl"))
        truth = [show(row.get("gold"), 3), _with_ends(row, "gold_difference", 3, signed=True)] if gold else []
        cells.append(
            (
                row["name"],
                row["method"],
                show(row.get("reward")),
                _with_ends(row, "win_rate", None),
                *truth,
                kl,
                show(row.get("length"), 1),
                show(row.get("eos_rate"), None),
                show(row.get("steps"), 0),
                show(row.get("seconds"), 0),
            )
        )
    return Table("", tuple(head), cells)


def kl_table(group: Group, nats: float) -> Table:
    """The policies at equal KL as a table."""
    given = rows_at(group, nats)
    gold = any("gold_gain" in row for row in given)
    head = ("", "method", "at step", "reward gain", "judge gain", *(("gold gain",) if gold else ()))
    cells = []
    for row in given:
        step = "from the exam" if "kl_bound" in row else show(row.get("rounds", row.get("step")), 0)
        if not row["reached"]:
            step = "not watched" if row["most"] is None else f"reached {show(row['most'])} nats at most"
        gains = [_with_ends(row, f"{name}_gain", 2, signed=True) for name in MEASURES if gold or name != "gold"]
        cells.append((row["name"], row["method"], step, *gains))
    return Table("", head, cells)


def _policy(rival: Rival, role: str) -> Numbers:
    return {key: number(rival.run.policy, role, key) for key in (*_POLICY_NUMBERS, *_GAINS)}


def _best_of(rival: Rival, n: int) -> Numbers:
    summary = rival.run.summary["best_of"]
    numbers = {key: value for key, value in summary.items() if key not in ("n", "gold_low", "gold_high")}
    ends = {f"gold_difference{end}": number(summary, f"gold{end}") for end in ("_low", "_high")}
    return {"name": f"best of {n}", "method": "best-of-n", **_policy(rival, "best_of"), **numbers, **ends}


def _run(rival: Rival) -> Numbers:
    summary = rival.run.summary
    numbers: Numbers = {}
    for name in ("win_rate", "win_rate_training_reward", "kl"):
        numbers |= {f"{name}{end}": number(summary, "ppo", f"{name}{end}") for end in _ENDS}
    for name in ("reward", "judge", "length"):
        ends = (f"{name}_difference{end}" for end in ("_low", "_high"))
        numbers |= {end: number(summary, "ppo", end) for end in ends}
    gold = {f"gold_difference{end}": number(summary, "gold", end.lstrip("_") or "difference") for end in _ENDS}
    made = {
        "steps": number(summary, rival.stage, "steps"),
        "chosen_step": number(summary, rival.stage, "chosen_step"),
        "seconds": number(summary, "seconds", rival.stage),
    }
    return {
        "name": rival.name,
        "method": rival.method,
        "seed": rival.seed,
        **_policy(rival, "ppo"),
        **numbers,
        **gold,
        **made,
    }


def _with_ends(row: Mapping[str, Any], name: str, digits: int | None, *, signed: bool = False) -> str:
    value, low, high = (row.get(f"{name}{end}") for end in _ENDS)
    if value is None:
        return DASH
    ends = [show(end, digits, signed=signed).rstrip("%") for end in (low, high) if end is not None]
    return show(value, digits, signed=signed) + (f" [{', '.join(ends)}]" if len(ends) == 2 else "")


def hashes(group: Group) -> Table:
    """What a group stands on, by the first signs of its hashes."""
    return Table("", (), [(words, group.stands_on[part][:12]) for part, words in SHARED.items()])
