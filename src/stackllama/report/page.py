"""`report.html` of a run: one self-contained page that says what came out, and shows it.

The page is made from the files of a run folder alone (`read_run` lists them) and holds no date, so the same run gives
the same bytes. A stage that has not run is left out, with a word in its place. Texts of questions and answers are
hostile input: everything goes through jinja2's escaping, control characters become visible, and the page's own security
policy forbids scripts and the network.

Left out on purpose: rendering of Markdown (an answer is shown as it was written), and scripts of any kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stackllama.data.pairs.baselines import Row, is_row
from stackllama.files import atomic_write_text
from stackllama.report import ability, audit, drift, events, figures, judged, samples, tables, watching
from stackllama.report.figures import Interval
from stackllama.report.layout import template
from stackllama.report.reading import STAGES, Run, coverage, kl_target, number, policy_method, policy_stage, read_run
from stackllama.report.verdict import DASH, show, span, verdict

POLICY_ROWS = (
    ("reward", "Reward, training reward model", 2),
    ("judge", "Score, judge", 2),
    ("kl", "KL from the SFT model, nats", 2),
    ("length", "Length, tokens", 1),
    ("eos_rate", "Finished answers", None),
    ("repetition", "Repeated runs of 4 tokens", None),
    ("entropy", "Entropy of a token, nats", 2),
    ("distinct_1", "Distinct tokens", 3),
    ("distinct_2", "Distinct token pairs", 3),
    ("distinct_3", "Distinct runs of 3 tokens", 3),
    ("human_perplexity", "Perplexity of human answers", 2),
    ("gold", "Gold (for reports only)", 3),
)
"""(name in evaluate/policy.json, label, digits; None for a percentage) of the table SFT against the others."""

DATA_COUNTS = ("rows", "questions", "answers", "pairs", "orphans")


def write_report(run_folder: Path, *, defaults: Mapping[str, Any] | None = None) -> Path:
    """Write `run_folder/report.html` (atomically) and return its path.

    `defaults` is the recipe's default settings as plain data: with it the page lists the settings that differ, without
    it all of them. Raises RunError where the folder is missing, holds nothing to report, or a JSON file cannot be read.
    """
    page = render(read_run(run_folder), defaults=defaults)
    target = run_folder / "report.html"
    # A model can emit half of a surrogate pair; the page must be valid UTF-8 all the same.
    atomic_write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def render(run: Run, *, defaults: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    target, judge, method = kl_target(run), number(run.summary, "judge", "accuracy"), policy_method(run.recipe)
    roles, level = _roles(run.summary, method), coverage(run)
    stage = policy_stage(run.recipe)
    most = number(run.recipe, "evaluate", "side_by_side")
    shown = samples.samples(run.samples[: None if most is None else int(most)], roles)
    guard, unseen_events = events.rows(run.events)
    drawn = {
        one: figures.stage(one, run.logs[one], targets={"kl": (f"target {target:g}", target)} if target else None)
        for one in STAGES
    }
    return template("template.html.jinja").render(
        name=run.name,
        base=_base(run.recipe),
        level=level,
        method=method,
        stage=stage,
        verdict=verdict(run.summary, target=target, level=level, method=method),
        counts=_counts(run),
        splits=_splits(run.data),
        dropped=_dropped(run.data, "dropped"),
        unpaired=_dropped(run.data, "pairs_dropped"),
        baselines=tables.baselines(_baselines(run.data)),
        sft=_facts(run.summary, "sft"),
        plots=drawn,
        guard=guard,
        unseen_events=unseen_events,
        watched=watching.figures_of(run.watch, run.recipe, chosen=number(run.summary, stage, "chosen_step")),
        watch_words=watching.words(run.summary, stage),
        alarms=[(show(step, 0), text) for step, text in run.alarms],
        accuracy=_accuracy_plot(run),
        advantage=_advantage_plot(run),
        audited=audit.audited(run.audit),
        judge_accuracy=show(judge, None) if judge is not None else None,
        win_rate=_win_plot(run.summary, roles[1:], run.endpoint),
        judged=judged.table(run.endpoint, dict(roles[1:])) if run.endpoint else None,
        judged_words=list(judged.sentences(run.endpoint, dict(roles[1:]))) if run.endpoint else [],
        drifted=drift.figures_of(run.drift, roles),
        drift_words=drift.words(run.drift, method),
        policies=[label for role, label in roles if role != "sft"],
        policy_rows=_policy_rows(run, [role for role, _ in roles[1:]]),
        remarks=_remarks(run),
        ability=ability.table(run.ability, method),
        ability_version=ability.version(run.ability),
        ability_remarks=ability.remarks(run.ability, run.lineage),
        best_of=show(number(run.summary, "best_of", "n"), 0) if number(run.summary, "best_of", "n") else None,
        best_of_kl=show(number(run.summary, "best_of", "kl_bound")),
        samples=shown,
        choices=samples.choices(shown, method),
        unseen=len(run.samples) - len(shown),
        settings=_settings(run.recipe, defaults),
        compared=defaults is not None,
        hashes=_hashes(run.lineage),
        environment=_environment(run.lineage),
        seconds=_seconds(run.summary),
        torn=sorted(run.torn.items()),
    )


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of nested mappings, in their order; lists stay whole, as JSON."""
    if isinstance(tree, Mapping):
        return [row for key, value in tree.items() for row in flatten(value, f"{prefix}.{key}" if prefix else str(key))]
    if not prefix:
        return []
    if isinstance(tree, int) and not isinstance(tree, bool):
        return [(prefix, str(tree))]
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str))]


def _base(recipe: Mapping[str, Any]) -> str:
    base = recipe.get("base")
    if isinstance(base, Mapping):
        base = base.get("model", base.get("name"))
    return base if isinstance(base, str) else ""


def _dropped(data: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """(reason in words, count) of everything that was left out."""
    dropped = data.get(name)
    rows = []
    for key, text in flatten(dropped if isinstance(dropped, Mapping) else {}):
        count = f"{int(text):,}" if text.isdecimal() else text
        rows.append((key.replace("_", " ").replace(".", ": "), count))
    return rows


def _baselines(data: Mapping[str, Any]) -> list[Row]:
    """What each rule of pairs does to the baselines."""
    rows = data.get("baselines")
    return [row for row in rows if is_row(row)] if isinstance(rows, list) else []


def _stages(lineage: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    stages = lineage.get("stages")
    return {name: s for name, s in stages.items() if isinstance(s, Mapping)} if isinstance(stages, Mapping) else {}


def _hashes(lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, hash): everything in the lineage but the stages' environments."""
    rows = flatten({key: value for key, value in lineage.items() if key != "stages"})
    for name, stage in _stages(lineage).items():
        rows += flatten({key: value for key, value in stage.items() if key != "environment"}, name)
    return rows


def _environment(lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, version or machine): once where all stages ran under the same, by stage where they did not."""
    by_key: dict[str, dict[str, str]] = {}
    for name, stage in _stages(lineage).items():
        for key, value in flatten(stage.get("environment", {})):
            by_key.setdefault(key.removeprefix("packages."), {})[name] = value
    rows = []
    for key, values in by_key.items():
        if len(set(values.values())) == 1:
            rows.append((key, next(iter(values.values()))))
        else:
            rows += [(f"{key} ({name})", value) for name, value in values.items()]
    return rows


def _counts(run: Run) -> list[tuple[str, str]]:
    found = ((key, number(run.summary, "data", key)) for key in DATA_COUNTS)
    pairs = [(key, number(run.data, key) if value is None else value) for key, value in found]
    return [(key, show(value, 0)) for key, value in pairs if value is not None]


def _splits(data: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(split, questions, answers, pairs); a split given as one number counts questions."""
    splits = data.get("splits")
    rows = []
    for name, value in splits.items() if isinstance(splits, Mapping) else ():
        counts = value if isinstance(value, Mapping) else {"questions": value}
        rows.append((str(name), [show(number(counts, key), 0) for key in ("questions", "answers", "pairs")]))
    return rows


def _facts(summary: Mapping[str, Any], stage: str) -> list[tuple[str, str]]:
    """Perplexity before and after, with intervals where given, and speed."""
    rows = []
    for when in ("before", "after"):
        value, low, high = (number(summary, stage, f"perplexity_{when}{end}") for end in ("", "_low", "_high"))
        if value is not None:
            interval = f" [{span(low, high)}]" if span(low, high) else ""
            rows.append((f"perplexity on held-out answers, {when}", show(value) + interval))
    speed = number(summary, stage, "tokens_per_second")
    return rows + ([("training speed, tokens a second", show(speed, 0))] if speed is not None else [])


def _accuracy_plot(run: Run) -> str | None:
    value, low, high = (number(run.summary, "reward", f"accuracy{end}") for end in ("", "_low", "_high"))
    if value is None:
        return None
    rows = [Interval("Reward model", value, low, high), *audit.rules(run.audit)[0]]
    return figures.whiskers("accuracy", "Accuracy", rows, reference=0.5, percent=True)


def _advantage_plot(run: Run) -> str | None:
    rows = audit.rules(run.audit)[1]
    if not rows:
        return None
    return figures.whiskers("advantage", "Paired difference", rows, reference=0.0, percent=True, signed=True)


def _roles(summary: Mapping[str, Any], method: str) -> list[tuple[str, str]]:
    """(role in evaluate/*.json, label) of all that answered."""
    n = number(summary, "best_of", "n")
    return [("sft", "SFT"), ("ppo", method), *([("best_of", f"best of {n:.0f}")] if n else [])]


def _win_plot(summary: Mapping[str, Any], roles: Sequence[tuple[str, str]], endpoint: Mapping[str, Any]) -> str | None:
    rows = []
    for role, label in roles:
        for key, scorer, ink in (
            ("win_rate", "judge", "accent"),
            ("win_rate_length_controlled", "judge at equal lengths", "accent"),
            ("win_rate_training_reward", "training reward model", "second"),
        ):
            value, low, high = (number(summary, role, f"{key}{end}") for end in ("", "_low", "_high"))
            if value is not None:
                rows.append(Interval(f"{label[0].upper()}{label[1:]}, {scorer}", value, low, high, ink))
    for label, value, low, high in judged.win_rates(endpoint, dict(roles)):
        rows.append(Interval(f"{label[0].upper()}{label[1:]}", value, low, high, "accent"))
    return figures.whiskers("win-rate", "Win rate over SFT", rows, reference=0.5, percent=True) if rows else None


def _policy_value(run: Run, role: str, key: str) -> float | None:
    """From `evaluate/policy.json`, else from the summary."""
    value = number(run.policy, role, key)
    if value is not None:
        return value
    if role == "best_of":
        return number(run.summary, role, "kl_bound" if key == "kl" else key)
    if key == "gold":
        return number(run.summary, "gold", role)
    if key == "kl":
        return number(run.summary, "ppo", "kl") if role == "ppo" else None
    return number(run.summary, "ppo", f"{key}_{'before' if role == 'sft' else 'after'}")


def _policy_interval(run: Run, role: str, key: str) -> tuple[float | None, float | None]:
    """Ends of the interval of a policy - SFT; the KL's own serves as well, since SFT's KL from itself is 0."""
    special = {
        ("ppo", "gold"): ("gold", ""),
        ("ppo", "kl"): ("ppo", "kl_"),
        ("best_of", "gold"): ("best_of", "gold_"),
    }
    section, prefix = special.get((role, key), (role, f"{key}_difference_"))
    return number(run.summary, section, f"{prefix}low"), number(run.summary, section, f"{prefix}high")


def _policy_rows(run: Run, others: Sequence[str]) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """(label, SFT, (value, difference, its interval) of each other policy) for each measure that is known."""
    rows = []
    for key, label, digits in POLICY_ROWS:
        sft = _policy_value(run, "sft", key)
        cells = [_policy_cell(run, role, key, digits, sft) for role in others]
        if sft is not None or any(cell[0] != DASH for cell in cells):
            rows.append((label, show(sft, digits), cells))
    return rows


def _policy_cell(run: Run, role: str, key: str, digits: int | None, sft: float | None) -> tuple[str, str, str]:
    value = _policy_value(run, role, key)
    if role == "best_of" and key == "kl":
        return f"at most {show(value, digits)}", DASH, ""
    change = None if sft is None or value is None else value - sft
    difference = DASH if change is None else show(change, digits, signed=True)
    if digits is None and change is not None:
        difference = f"{show(change * 100, 1, signed=True)} points"
    return show(value, digits), difference, span(*_policy_interval(run, role, key), digits, signed=True)


def _remarks(run: Run) -> list[str]:
    """What a reader should notice in the table: drifts that reward models are known to be fooled by, gold apart."""
    said = []
    (long_before, long_after), (eos_before, eos_after), (same_before, same_after) = (
        tuple(_policy_value(run, role, key) for role in ("sft", "ppo")) for key in ("length", "eos_rate", "repetition")
    )
    if long_before and long_after and not 0.67 <= long_after / long_before <= 1.5:
        way = "grew" if long_after > long_before else "shrank"
        said.append(
            f"Answers {way} from {show(long_before, 0)} to {show(long_after, 0)} tokens on average: "
            "compare the samples before trusting the reward."
        )
    if eos_before is not None and eos_after is not None and eos_after < eos_before - 0.05:
        said.append(
            f"Fewer answers finish by themselves: {show(eos_before, None)} before, {show(eos_after, None)} after."
        )
    if same_before is not None and same_after is not None and same_after > max(1.5 * same_before, same_before + 0.02):
        said.append(f"Answers repeat themselves more: {show(same_before, 3)} before, {show(same_after, 3)} after.")
    return said


def _settings(recipe: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """(key, value, default); only the settings that differ where the defaults are known."""
    usual = dict(flatten(defaults or {}))
    rows = [(key, value, usual.get(key, "")) for key, value in flatten(recipe)]
    return rows if defaults is None else [row for row in rows if row[0] not in usual or row[1] != row[2]]


def _seconds(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(stage, seconds, share of the total)."""
    given = summary.get("seconds")
    stages = [(str(key), number(given, key)) for key in given] if isinstance(given, Mapping) else []
    total = number(given, "total")
    return [
        (stage, show(value, 1), show(value / total, None) if total and stage != "total" else "")
        for stage, value in stages
        if value is not None
    ]
