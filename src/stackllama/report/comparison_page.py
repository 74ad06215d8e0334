"""The page of `stackllama compare`: the tables, and for each score what was gained over the KL that it cost.

Self-contained like the report of a run (`page.py`), from the same parts; the same runs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stackllama.files import atomic_write_text
from stackllama.report import comparison, seeds
from stackllama.report.equal_kl import MEASURES
from stackllama.report.figures import Drawn, Interval, whiskers
from stackllama.report.frontier import Dashes, Line, Mark, curve, draw
from stackllama.report.layout import template
from stackllama.report.reading import coverage, number
from stackllama.report.rivals import Group, Rival
from stackllama.report.verdict import show

MOST_NAMES = 4
INKS = ("accent", "second", "text", "limit", "muted")
MARKERS = ("o", "s", "^", "D", "v")
DASHES: tuple[Dashes, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""By method an ink and a marker, by run of a method dashes: what tells lines apart besides colour."""

TITLES = {
    "reward": ("Training reward over KL", "by the training reward model, which the policies were trained to please"),
    "judge": ("Judge over KL", "by the judge, which no policy was trained on"),
    "gold": ("Gold over KL", "by the truth that the embedded community is built on"),
}


def write_page(path: Path, several: Sequence[Group], kl: float | None) -> None:
    """Write the page to `path`, whole or not at all; `kl`: where to compare, in nats. Raises RunError where the disk
    refuses.
    """
    atomic_write_text(path, render(several, kl))


def render(several: Sequence[Group], kl: float | None) -> str:
    """The page as text."""
    rivals = [rival for group in several for rival in group.rivals]
    sections = []
    for at, (group, exam, equal, where) in enumerate(comparison.shown(several, kl)):
        sections.append(
            {
                "title": comparison.title(group, several),
                "exam": exam,
                "equal": equal,
                "where": show(where),
                "figures": [
                    *_wins(group, f"group-{at}"),
                    *(_frontier(group, measure, f"group-{at}", where) for measure in MEASURES if _has(group, measure)),
                ],
                "hashes": comparison.hashes(group),
            }
        )
    return template("comparison.html.jinja").render(
        names=_names(rivals),
        level=coverage(rivals[0].run),
        remarks=comparison.remarks(several),
        sections=sections,
        over_seeds=seeds.tables(several, seeds.where(several, kl)),
    )


def _names(rivals: Sequence[Rival]) -> str:
    """What the page is called: the runs, or how many there are."""
    if len(rivals) <= MOST_NAMES:
        return ", ".join(rival.name for rival in rivals)
    return f"{len(rivals)} runs, from {rivals[0].name} to {rivals[-1].name}"


def _wins(group: Group, prefix: str) -> list[Drawn]:
    rows = []
    for row in comparison.rows(group):
        if "win_rate" in row:
            ink = _ink(row["method"], group)
            ends = row.get("win_rate_low"), row.get("win_rate_high")
            rows.append(Interval(row["name"], row["win_rate"], *ends, ink))
    if not rows:
        return []
    svg = whiskers(f"{prefix}-wins", "Win rate over SFT", rows, reference=0.5, percent=True)
    caption = "Share of held-out questions where the judge prefers the answer to SFT's. Dashed: no preference."
    return [Drawn("Win rate over SFT's answers", caption, svg)]


def _has(group: Group, measure: str) -> bool:
    return any(rival.log.get(f"{measure}_gain") for rival in group.rivals)


def _frontier(group: Group, measure: str, prefix: str, where: float | None) -> Drawn:
    title, by = TITLES[measure]
    lines, marks, seen = [], [], dict[str, int]()
    for rival in group.rivals:
        ink, marker = _ink(rival.method, group), MARKERS[_place(rival.method, group) % len(MARKERS)]
        count = seen[rival.method] = seen.get(rival.method, -1) + 1
        points = curve(rival.log, f"{measure}_gain")
        chosen = number(rival.run.summary, rival.stage, "chosen_step")
        ringed = curve(rival.log, f"{measure}_gain", only=chosen)
        label = rival.name if rival.method in rival.name.upper() else f"{rival.name} ({rival.method})"
        if points:
            lines.append(Line(label, ink, DASHES[count % len(DASHES)], marker, points, ringed))
            label = ""  # one entry of the legend is enough
        marks += _exam_mark(rival, "ppo", measure, label, ink, marker, number(rival.run.summary, "ppo", "kl"))
    for n, rival in group.best_of.items():
        bound = number(rival.run.summary, "best_of", "kl_bound")
        marks += _exam_mark(rival, "best_of", measure, f"best of {n}", "muted", "*", bound)
    svg = draw(f"{prefix}-{measure}", title, lines, marks, bound=where, columns=2)
    return Drawn(title, f"Gain {by}.", svg)


def _exam_mark(
    rival: Rival, role: str, measure: str, label: str, ink: str, marker: str, kl: float | None
) -> list[Mark]:
    gain, low, high = (number(rival.run.policy, role, f"{measure}_gain{end}") for end in ("", "_low", "_high"))
    return [] if gain is None or kl is None else [Mark(label, ink, marker, kl, gain, low, high)]


def _place(method: str, group: Group) -> int:
    methods = list(dict.fromkeys(rival.method for rival in group.rivals))
    return methods.index(method) if method in methods else -1


def _ink(method: str, group: Group) -> str:
    """A method's ink; best-of-n, which is trained by none, is muted."""
    place = _place(method, group)
    return "muted" if place < 0 else INKS[place % len(INKS)]
