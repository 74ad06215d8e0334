"""A page that shows what data hold: counts, lengths, votes, baselines, what was left out, and some questions.

Self-contained like the report of a run (`page.py`), and from the same parts. The texts of strangers are rendered by
`markdown.py`; the page's own policy forbids scripts, images and the network. It holds no date: the same data and seed
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackllama.data.pairs.baselines import SAMPLE, Row
from stackllama.data.posts import Attribution
from stackllama.data.store.census import LENGTH_STARTS, SMALL_STARTS, VOTE_STARTS, Bin, Census
from stackllama.data.store.opening import Opened
from stackllama.data.store.picking import Picked
from stackllama.files import atomic_write_text
from stackllama.report import tables
from stackllama.report.bars import histogram
from stackllama.report.figures import Drawn, Interval, whiskers
from stackllama.report.layout import clipped, is_web, template
from stackllama.report.markdown import to_html
from stackllama.report.question import day, marks

ANSWERS_LIMIT, PAGE_LIMIT = 10, 400_000
"""Answers of a question that are shown, and characters of all texts together; what is left out is said."""

DEVIATIONS = 1.96
"""Standard errors to each side that make an interval of 95%."""


def write_page(path: Path, opened: Opened, census: Census, picked: Sequence[Picked], *, seed: int) -> None:
    """Write the page to `path`, whole or not at all. Raises RunError where the disk is full or refuses.

    `picked` are the questions to show, drawn with `seed`.
    """
    atomic_write_text(path, render(opened, census, picked, seed=seed))


def render(opened: Opened, census: Census, picked: Sequence[Picked], *, seed: int) -> str:
    """The page as text."""
    rows = tables.baseline_rows(opened.report, census)
    samples = _samples(picked)
    return template("data_page.html.jinja").render(
        name=Path(opened.path).name or opened.path,
        kind=opened.kind,
        notes=tables.notes(opened, census),
        length=tables.LENGTH,
        overview=tables.overview(opened, census),
        splits=tables.splits(census),
        sites=tables.sites(census) if len(census.sites) > 1 else None,
        counts=_counts(census),
        quantiles=tables.quantiles(census),
        lengths=_lengths(census),
        votes=_votes(census),
        content=tables.content(census),
        tags=tables.tags(census),
        tag_bars=_tag_bars(census),
        left_out=tables.left_out(opened.report, census),
        remarks=tables.remarks(opened.report),
        baselines=tables.baselines(rows),
        baseline_plots=_baseline_plots(rows),
        measured_on=f"{SAMPLE:,}",
        samples=samples,
        unseen=len(picked) - len(samples),
        paired=sum(census.pairs_per_question.counts.values()) - census.pairs_per_question.counts.get(0, 0),
        seed=seed,
    )


def _lengths(census: Census) -> list[Drawn]:
    caption = "characters as a reader sees them, on a logarithmic axis; a number stands where its bar begins."
    spreads = {"question": census.questions.lengths, "answer": census.answers.lengths}
    return [
        _drawn(
            f"{what}-length",
            f"Length of {'an' if what == 'answer' else 'a'} {what}",
            f"{what.capitalize()}s by {caption}",
            spread.bins(LENGTH_STARTS),
            begins=True,
        )
        for what, spread in spreads.items()
    ]


def _votes(census: Census) -> list[Drawn]:
    caption = "up-votes less down-votes; bars grow wider away from 0, as far below it as above."
    drawn = [
        _drawn(f"{what}-votes", f"Votes of {article}", f"{plural} by {caption}", texts.votes.bins(VOTE_STARTS))
        for what, article, plural, texts in (
            ("question", "a question", "Questions", census.questions),
            ("answer", "an answer", "Answers", census.answers),
        )
    ]
    gaps = "Pairs by how much better the score of the better answer is."
    return [*drawn, _drawn("gaps", "Score gap of a pair", gaps, census.gaps.bins(SMALL_STARTS))]


def _counts(census: Census) -> list[Drawn]:
    answers, pairs = census.answers_per_question, census.pairs_per_question
    drawn = [
        _drawn("answers", "Answers of a question", "Questions by their answers.", answers.bins(SMALL_STARTS)),
        _drawn("pairs", "Pairs of a question", "Questions by their pairs.", pairs.bins(SMALL_STARTS)),
    ]
    years = [Bin(int(year), int(year), n) for year, n in census.questions.years.items() if year.isdecimal()]
    if len(years) > 1:
        drawn.append(_drawn("years", "Questions by year", "When they were asked.", years))
    return drawn


def _drawn(name: str, title: str, caption: str, bins: Sequence[Bin], *, begins: bool = False) -> Drawn:
    return Drawn(title, caption, histogram(name, title, bins, begins=begins) if bins else "")


def _baseline_plots(rows: Sequence[Row]) -> list[Drawn]:
    plots = []
    for what in ("longer", "earlier"):
        intervals = [
            Interval(
                row["rules"],
                row[f"{what}_wins"],
                row[f"{what}_wins"] - DEVIATIONS * row[f"{what}_error"],
                row[f"{what}_wins"] + DEVIATIONS * row[f"{what}_error"],
                "second" if number else "accent",
            )
            for number, row in enumerate(rows)
            if row["questions"]
        ]
        if intervals:
            title = f"The {what} answer wins"
            svg = whiskers(f"{what}-wins", title, intervals, reference=0.5, percent=True)
            plots.append(Drawn(title, "Share of pairs, mean over questions, with 95% intervals. Dashed: a coin.", svg))
    return plots


def _tag_bars(census: Census) -> list[tuple[str, str, float]]:
    """(tag, questions, percent of the longest bar)."""
    shown = census.tags[: tables.MOST_ROWS]
    return [(tag, f"{count:,}", round(100 * count / shown[0][1], 1)) for tag, count in shown]


def _samples(picked: Sequence[Picked]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    room = PAGE_LIMIT
    for one in picked:
        answers = one.question.answers[:ANSWERS_LIMIT]
        room -= sum(len(clipped(text)[0]) for text in (one.question.text, *(answer.text for answer in answers)))
        if room < 0 and shown:
            break
        shown.append(_sample(one))
    return shown


def _sample(picked: Picked) -> dict[str, Any]:
    question = picked.question
    facts = [f"{question.votes:,} votes", day(question.date), f"split {picked.split}"]
    facts += [f"cluster {question.cluster}"] if question.cluster not in ("", f"{question.site}/{question.id}") else []
    facts += [f"weight {question.weight:g}"] if question.weight != 1 else []
    answers = [
        {
            **_post(answer.text, answer.attribution),
            "place": place + 1,
            "accepted": answer.accepted,
            "facts": [f"{answer.votes:,} votes", day(answer.date)],
            "marks": list(marks(question, place)),
        }
        for place, answer in enumerate(question.answers[:ANSWERS_LIMIT])
    ]
    return {
        **_post(question.text, question.attribution),
        "title": question.title or f"Question {question.id}",
        "facts": facts,
        "tags": question.tags,
        "answers": answers,
        "unseen": len(question.answers) - len(answers),
    }


def _post(text: str, by: Attribution) -> dict[str, Any]:
    """A text as HTML, how much of it is not shown, and whom to name; (address, whether it may be a link)."""
    shown, cut = clipped(text)
    return {
        "html": to_html(shown),
        "cut": f"{cut:,}" if cut else "",
        "author": by.author,
        "profile": by.profile_url if by.profile_url and is_web(by.profile_url) else "",
        "license": by.license,
        "url": by.url,
        "link": is_web(by.url),
    }
