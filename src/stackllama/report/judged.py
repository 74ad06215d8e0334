"""What a judge behind an address said (`asked/judge.json`), as a table, as sentences and as rows of a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stackllama.report.reading import number
from stackllama.report.verdict import DASH, show, span

if TYPE_CHECKING:
    from stackllama.report.tables import Table

NAMES = {"ppo": "policy", "best_of": "best of n"}
"""What answers are called where the method is not known."""
AGREED = {"judge": "the run's own judge", "reward": "the training reward model", "gold": "gold"}
COUNTS = {
    "questions": "questions",
    "won": "won in both orders",
    "lost": "lost in both orders",
    "equal": "the same text, not asked",
    "unreadable": "left out: no readable verdict",
}
LONGEST_NAME = 28
"""Characters of a model's name in a figure."""

Rated = tuple[str, float, float | None, float | None]


def short_name(found: Mapping[str, Any]) -> str:
    """The model's name without the folders or owner before it, cut to fit into a figure."""
    name = str(found.get("model", "")).rstrip("/").rpartition("/")[2] or "judge"
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def win_rates(found: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Rated]:
    """(label, win rate, low, high) of each policy: over the SFT model, and the same at equal lengths."""
    name = short_name(found)
    for role, label in labels.items():
        for key, what in (("win_rate", name), ("win_rate_length_controlled", "the same at equal lengths")):
            value, low, high = (number(found, "policies", role, f"{key}{end}") for end in ("", "_low", "_high"))
            if value is not None:
                yield f"{label}, {what}", value, low, high


def table(found: Mapping[str, Any], labels: Mapping[str, str] = NAMES) -> Table:
    """A row for each number, a column for each policy."""
    from stackllama.report.tables import Table

    roles = [role for role in labels if number(found, "policies", role, "questions") is not None]
    wanted = [
        ("win rate over SFT", "win_rate"),
        ("the same at equal lengths", "win_rate_length_controlled"),
        ("verdict depends on the order", "disagreement"),
        ("first place wins", "first_place"),
    ]
    rows = [(label, *(_with_span(found, "policies", role, key) for role in roles)) for label, key in wanted]
    for name, label in AGREED.items():
        cells = [_with_span(found, "policies", role, "agreement", name, "share") for role in roles]
        if any(cell != DASH for cell in cells):
            rows.append((f"prefers the same as {label}", *cells))
    for key, label in COUNTS.items():
        rows += [(label, *(show(number(found, "policies", role, key), 0) for role in roles))]
    return Table(f"{found.get('model', '')} as judge", ("", *(labels[role] for role in roles)), rows)


def sentences(found: Mapping[str, Any], labels: Mapping[str, str] = NAMES) -> Iterator[str]:
    """What has to be known to read the numbers: the judge's taste for a place, the cost, what is left out."""
    for role, label in labels.items():
        if number(found, "policies", role, "disagreement") is not None:
            moved, first = (_with_span(found, "policies", role, key) for key in ("disagreement", "first_place"))
            yield (
                f"{label[:1].upper()}{label[1:]}: asked in both orders, the judge gave another verdict in {moved} of "
                f"the questions; these count one half. Where it named a winner, it named the first place in {first}."
            )
    yield _cost(found)
    left, unasked = number(found, "left") or 0, number(found, "unasked") or 0
    if left or unasked:
        yield f"Left out: {show(left, 0)} questions of the exam, {show(unasked, 0)} comparisons that were not asked."


def _cost(found: Mapping[str, Any]) -> str:
    read, written, cost = (number(found, key) for key in ("tokens_in", "tokens_out", "cost"))
    replies = (number(found, "requests") or 0) + (number(found, "cached") or 0)
    about = "" if found.get("tokens_counted") is True else "about "
    price = f", {money(cost)} at the prices given" if cost is not None else ""
    return (
        f"{show(replies, 0)} replies; {about}{show(read, 0)} tokens read and {about}{show(written, 0)} written{price}."
    )


def money(value: float) -> str:
    """An amount in whatever currency; of a small one the first two digits that say something."""
    return f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:#.2g}"


def _with_span(found: Mapping[str, Any], *keys: str) -> str:
    *before, last = keys
    value, low, high = (number(found, *before, f"{last}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return DASH
    ends = span(low, high, None)
    return f"{show(value, None)} [{ends}]" if ends else show(value, None)
