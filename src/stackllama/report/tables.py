"""What data hold, as tables of words and numbers: the same ones in a terminal and on a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stackllama.data.pairs.baselines import Row
from stackllama.data.pairs.rules import ALL_TIED
from stackllama.data.store.census import QUANTILES, Census, Spread
from stackllama.data.store.opening import DUMP, RUN, STORE, Opened, Report

MOST_ROWS = 20
"""Sites that are shown; `data stats --json` has more of them."""

LENGTH = (
    "A length is what a reader sees: without tags and addresses of links (of questions: Markdown without these "
    "addresses; of answers that never were HTML: their text)."
)

Cells = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first cell of a row is its name. `total`: the last row is the sum of those above it."""

    title: str
    head: Cells
    rows: Sequence[Cells]
    total: bool = False

    @property
    def numeric(self) -> bool:
        """Whether what follows the names is numbers, which stand flush right."""
        return bool(self.head) or all(cell.replace(",", "").isdigit() for row in self.rows for cell in row[1:])


def overview(opened: Opened, census: Census) -> Table:
    """What it is and how much of it there is."""
    asked, answered = census.questions, census.answers
    paired = asked.count - census.pairs_per_question.counts.get(0, 0)
    licenses = sorted((Counter(asked.licenses) + Counter(answered.licenses)).items())
    sites = ", ".join(site for site, *_ in census.sites[:3])
    more = f" and {len(census.sites) - 3:,} more" if len(census.sites) > 3 else ""
    return Table(
        "In short",
        (),
        [
            ("kind", opened.kind),
            ("sites", sites + more),
            ("questions", f"{asked.count:,}"),
            ("answers", f"{answered.count:,}"),
            ("pairs", f"{census.pairs_per_question.total:,}"),
            ("questions with a pair", _part(paired, asked.count)),
            ("questions with an accepted answer", _part(census.accepted, asked.count)),
            ("asked", _period(asked.first, asked.last)),
            ("answered", _period(answered.first, answered.last)),
            ("licences, by texts", ", ".join(f"{name} ({count:,})" for name, count in licenses)),
        ],
    )


def splits(census: Census) -> Table:
    """The counts of each split."""
    counts = [(split, *_counts(given)) for split, given in census.splits.items()]
    total = {what: sum(given[what] for given in census.splits.values()) for what in ("questions", "answers", "pairs")}
    return Table(
        "By split", ("split", "questions", "answers", "pairs"), [*counts, ("all", *_counts(total))], total=True
    )


def sites(census: Census) -> Table:
    """The counts of the largest sites."""
    rows = [(site, *(f"{count:,}" for count in counts)) for site, *counts in census.sites[:MOST_ROWS]]
    left = len(census.sites) - len(rows)
    title = f"By site, the largest {len(rows)}" if left > 0 else "By site"
    return Table(title, ("site", "questions", "answers", "pairs"), rows)


def quantiles(census: Census) -> Table:
    """Lengths, votes and counts: where most of them lie."""
    spreads = {
        "length of a question": census.questions.lengths,
        "length of an answer": census.answers.lengths,
        "votes of a question": census.questions.votes,
        "votes of an answer": census.answers.votes,
        "answers of a question": census.answers_per_question,
        "pairs of a question": census.pairs_per_question,
        "score gap of a pair": census.gaps,
    }
    names = (*(f"{share:.0%}" if share != 0.5 else "median" for share in QUANTILES.values()),)
    head = ("", "mean", "least", *names, "greatest")
    return Table("Lengths in characters, votes, answers, pairs", head, [(n, *_summary(s)) for n, s in spreads.items()])


def content(census: Census) -> Table:
    """How many texts have code, formulas, links, images."""
    asked, answered = census.questions, census.answers
    rows = [
        (what, _share(count, asked.count), _share(answered.content[what], answered.count))
        for what, count in asked.content.items()
    ]
    return Table("Share of texts with", ("", "questions", "answers"), rows)


def tags(census: Census) -> Table:
    """The tags that most questions have."""
    rows = [(tag, f"{count:,}", _share(count, census.questions.count)) for tag, count in census.tags[:MOST_ROWS]]
    left = census.different_tags - len(rows)
    title = f"Tags, the first {len(rows)} of {census.different_tags:,}" if left > 0 else "Tags"
    return Table(title, ("tag", "questions", "share"), rows)


def left_out(report: Report, census: Census) -> list[Table]:
    """What became of every post, question and pair; each table adds up. What nobody kept the counts of is left away."""
    asked, answered = census.questions.count, census.answers.count
    single = sum(census.answers_per_question.counts.get(number, 0) for number in (0, 1))
    unpaired = census.pairs_per_question.counts.get(0, 0)
    became = {
        "with a pair": asked - unpaired,
        "fewer than two answers": single,
        "two answers or more, but no pair": unpaired - single,
    }
    compared = {
        reason.removeprefix("pair: "): count
        for reason, count in report.get("pairs_dropped", {}).items()
        if reason.startswith("pair: ")
    }
    found = []
    if "rows" in report:
        read = {"questions": asked, "answers": answered, **report.get("dropped", {})}
        found.append(_adding("Posts that were read", read))
    found.append(_adding("Questions", became))
    if compared:
        found.append(_adding("Pairs of two answers", {"kept": census.pairs_per_question.total, **compared}))
    return found


def remarks(report: Report) -> Table:
    """What else a build counted: where tables break off, notes, and clusters of questions."""
    broken = {
        f"{dump}: {table} breaks off at byte": byte
        for dump, tables in report.get("truncated", {}).items()
        for table, byte in tables.items()
    }
    tied = {ALL_TIED: report.get("pairs_dropped", {}).get(ALL_TIED, 0)}
    names = {
        "clusters": "clusters of several questions",
        "questions in them": "clusters: questions in them, whether or not they were left out later",
    }
    clusters = {names.get(what, f"clusters: {what}"): n for what, n in report.get("clusters", {}).items()}
    counted = {what: count for what, count in {**report.get("notes", {}), **tied, **clusters}.items() if count}
    return Table("Also counted", (), [(what, f"{count:,}") for what, count in {**broken, **counted}.items()])


def notes(opened: Opened, census: Census) -> list[str]:
    """What has to be known in order not to misread the numbers."""
    said = []
    if opened.rebuilt:
        said.append(
            "This is no run: it was read with the default recipe, and what was made of it is gone again. Pairs, splits "
            "and clusters are those that a run with this recipe gets. What is large is better built once, by "
            f"`stackllama data RECIPE --data.source {opened.path}`, and looked at there."
        )
    if opened.kind not in (RUN, STORE, DUMP):
        said.append(
            "Other tools keep scores, or pairs alone, and no votes: the votes here are the fewest that give these "
            "scores, or that agree with the pairs."
        )
    if not opened.report:
        said.append("Nobody kept what was left out when these data were built, and what other rules would have given.")
    if not census.questions.first:
        said.append("No text has a date, so of two answers none is the earlier: that baseline is one half.")
    return said


def baseline_rows(report: Report, census: Census) -> list[Row]:
    """The baselines of the pairs that are there, then what each rule did to them, as far as it was measured."""
    return [census.baselines, *report.get("baselines", [])]


def baselines(rows: Iterable[Row]) -> Table:
    """The two baselines under each way to choose pairs, with their standard errors."""
    head = ("pairs under", "questions", "pairs", "longer wins", "earlier wins")
    cells = [
        (row["rules"], f"{row['questions']:,}", f"{row['pairs']:,}", _mean(row, "longer"), _mean(row, "earlier"))
        for row in rows
    ]
    return Table("Baselines", head, cells)


def lines(table: Table) -> Iterator[str]:
    """A table for a terminal: its title, then a line a row. Numbers are flush right, words flush left."""
    yield table.title
    rows = [row for row in (table.head, *table.rows) if row]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        rest = "  ".join(cells if table.numeric else row[1:])
        yield f"  {row[0]:<{widths[0]}}  {rest}".rstrip()


def _adding(title: str, counts: Mapping[str, int]) -> Table:
    rows = [(what, f"{count:,}") for what, count in counts.items()]
    return Table(title, (), [*rows, ("together", f"{sum(counts.values()):,}")], total=True)


def _counts(given: Mapping[str, int]) -> Cells:
    return tuple(f"{given[what]:,}" for what in ("questions", "answers", "pairs"))


def _summary(spread: Spread) -> Cells:
    told = spread.summary()
    names = ("least", *QUANTILES, "greatest")
    cells = ("-" if told[name] is None else f"{told[name]:,}" for name in names)
    return ("-" if told["mean"] is None else f"{told['mean']:,.1f}", *cells)


def _mean(row: Row, what: str) -> str:
    mean, error = row[f"{what}_wins"], row[f"{what}_error"]
    return "-" if mean is None or not row["questions"] else f"{mean:.3f} ± {error:.3f}"


def _part(count: int, total: int) -> str:
    return f"{count:,} ({_share(count, total)})"


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "-"


def _period(first: str, last: str) -> str:
    return f"{first[:10]} to {last[:10]}" if first else "no dates"
