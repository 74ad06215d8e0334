"""What a store holds, counted by duckdb in a few passes over its shards; memory stays flat, whatever their number.

What is counted (lengths, votes, gaps, ...) takes few different values, so each is counted exactly (`Spread`), and
means, quantiles and histograms come out of the counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

from stackllama.data.pairs.baselines import Row
from stackllama.data.store.shards import queries, question_shards

MOST_SITES, MOST_TAGS = 200, 30
"""Sites and tags that are told, the largest first."""

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}

LENGTH_STARTS = (0, *sorted({round(2 ** (half / 2)) for half in range(41)}))
"""Where the bins of lengths begin: two to a doubling."""
VOTE_STARTS = (*(-(1 << power) for power in range(10, -1, -1)), 0, 1, *(1 + (1 << power) for power in range(15)))
"""Where the bins of votes begin: ..., -4, -2, -1, 0, 1, 2, 3, 5, 9, ...; as wide below 0 as above."""
SMALL_STARTS = (*range(11), 11, 16, 21, 31, 51, 101)
"""Where the bins of small numbers begin: answers and pairs of a question, gaps of a pair."""

CONTENT = {
    "code block": "contains(text, '```')",
    "inline code": r"regexp_matches(text, '`[^`\n]+`')",
    # TeX is told from money: no space inside of the signs, no digit behind them.
    "LaTeX": r"regexp_matches(bare(text), '(?s)\$\$[^$]+\$\$|\\begin\{|\$[^\s$]([^$\n]*[^\s$])?\$([^0-9]|$)')",
    "link": "contains(bare(text), '://')",
    "image": r"regexp_matches(text, '!\[[^\]\n]*\]\(')",
}
"""What is looked for in texts, and how; `bare` is a text without its code and images."""

AS_THEY_ARE = "the pairs as they are here"

_MACROS = r"""
create macro bare(text) as regexp_replace(text, '(?s)```.*?```|`[^`\n]*`|!\[[^\]\n]*\]\([^)\n]*\)', '', 'g');
create macro seen(text) as length(regexp_replace(text, '\]\([^()\s]*\)', ']', 'g'));
create macro over(one, other) as case when one > other then 1.0 when one = other then 0.5 else 0.0 end;
"""
_TEXTS = f"""
    coalesce(histogram(votes), map {{}}) as votes,
    coalesce(histogram(length), map {{}}) as lengths,
    [{", ".join(f"count(*) filter ({test})" for test in CONTENT.values())}] as content,
    coalesce(histogram(date[:4]), map {{}}) as years,
    coalesce(histogram(attribution.license), map {{}}) as licenses,
    coalesce(min(date) filter (date <> ''), '') as first,
    coalesce(max(date), '') as last
"""
_QUESTIONS = f"""
with told as (
    select *, seen(text) as length, [coalesce(one.length, length(one.text)) for one in answers] as lengths
    from read_parquet($files)
),
compared as (
    select *,
        list_avg([over(lengths[p.better + 1], lengths[p.worse + 1]) for p in pairs]) as longer,
        list_avg([over(answers[p.worse + 1].date, answers[p.better + 1].date) for p in pairs]) as earlier
    from told
)
select {_TEXTS},
    histogram(len(answers)) as answers,
    histogram(len(pairs)) as pairs,
    count(*) filter (len([1 for one in answers if one.accepted]) > 0) as accepted,
    count(longer) as compared,
    avg(longer) as longer, stddev_pop(longer) as longer_deviation,
    avg(earlier) as earlier, stddev_pop(earlier) as earlier_deviation
from compared
"""  # noqa: S608 - made of our own words
_ANSWERS = f"""
with one as (select unnest(answers) as answer from read_parquet($files)),
told as (
    select answer.votes as votes, answer.text as text, coalesce(answer.length, length(answer.text)) as length,
        answer.date as date, answer.attribution as attribution
    from one
)
select {_TEXTS} from told
"""  # noqa: S608 - made of our own words
_GAPS = """
with one as (select unnest(pairs) as pair from read_parquet($files))
select coalesce(histogram(pair.gap), map {}) as gaps from one
"""
_SITES = """
select site, count(*) as questions, sum(len(answers))::bigint as answers, sum(len(pairs))::bigint as pairs
from read_parquet($files) group by site order by questions desc, site limit $most
"""
_TAGS = """
with one as (select unnest(tags) as tag from read_parquet($files))
select tag, count(*) as questions, count(*) over () as different
from one group by tag order by questions desc, tag limit $most
"""


@dataclass(frozen=True, slots=True)
class Bin:
    """How many values are `low` to `high`, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Whole numbers, each with how often it occurs."""

    counts: Mapping[int, int]

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(value * count for value, count in self.counts.items())

    def quantile(self, share: float) -> int | None:
        """The least of them that at least this share does not exceed; None where there are none."""
        left = share * self.count
        for value in sorted(self.counts):
            left -= self.counts[value]
            if left <= 0:
                return value
        return None

    def summary(self) -> dict[str, float | None]:
        """Count, mean, least, `QUANTILES` and greatest, by name; None where there is no number at all."""
        found = {name: self.quantile(share) for name, share in QUANTILES.items()}
        mean = self.total / self.count if self.counts else None
        return {
            "count": self.count,
            "mean": mean,
            "least": min(self.counts, default=None),
            **found,
            "greatest": max(self.counts, default=None),
        }

    def bins(self, starts: Sequence[int]) -> list[Bin]:
        """A histogram. A bin begins at each of `starts`, which rise; what is below them all is a bin of its own. Empty
        bins at both ends are left out.
        """
        if not self.counts:
            return []
        low, high = min(self.counts), max(self.counts)
        edges = sorted({*starts, min(low, starts[0]), max(high, starts[-1]) + 1})
        counts = [0] * (len(edges) - 1)
        for value, count in self.counts.items():
            counts[bisect_right(edges, value) - 1] += count
        bins = [Bin(start, stop - 1, count) for (start, stop), count in zip(pairwise(edges), counts, strict=True)]
        first, last = (bisect_right(edges, value) - 1 for value in (low, high))
        return bins[first : last + 1]


@dataclass(frozen=True, slots=True)
class Texts:
    """Questions, or answers: their votes; lengths in characters as a reader sees them; how many have what of `CONTENT`;
    how many there are of each year and licence; the first and the last moment. Year and moments are "" without a date.
    """

    votes: Spread
    lengths: Spread
    content: Mapping[str, int]
    years: Mapping[str, int]
    licenses: Mapping[str, int]
    first: str
    last: str

    @property
    def count(self) -> int:
        """How many there are."""
        return self.votes.count


@dataclass(frozen=True, slots=True)
class Census:
    """What a store holds. `splits` has the counts of each; `sites` (site, questions, answers, pairs) and `tags` (tag,
    questions), the largest first; `accepted` counts questions with an accepted answer; `baselines` are those of
    all pairs that are there, in the form of `baselines.add`.
    """

    splits: Mapping[str, Mapping[str, int]]
    sites: Sequence[tuple[str, int, int, int]]
    tags: Sequence[tuple[str, int]]
    different_tags: int
    questions: Texts
    answers: Texts
    answers_per_question: Spread
    pairs_per_question: Spread
    gaps: Spread
    accepted: int
    baselines: Row


def take(folder: Path) -> Census:
    """The census of the store in `folder`. Raises DataError where it holds no question, or is not what was written."""
    splits, shards = question_shards(folder)
    with queries(shards, _MACROS) as ask:
        (asked,), (answered,), (pairs,) = ask(_QUESTIONS), ask(_ANSWERS), ask(_GAPS)
        sites, tags = ask(_SITES, most=MOST_SITES), ask(_TAGS, most=MOST_TAGS)
    per_question = Spread(asked["pairs"])
    return Census(
        splits=splits,
        sites=[(one["site"], one["questions"], one["answers"], one["pairs"]) for one in sites],
        tags=[(one["tag"], one["questions"]) for one in tags],
        different_tags=tags[0]["different"] if tags else 0,
        questions=_texts(asked),
        answers=_texts(answered),
        answers_per_question=Spread(asked["answers"]),
        pairs_per_question=per_question,
        gaps=Spread(pairs["gaps"]),
        accepted=asked["accepted"],
        baselines=_baselines(asked, per_question.total),
    )


def to_json(census: Census) -> dict[str, Any]:
    """The census as plain data: every `Spread` as its summary and its histogram, [low, high, count] of each bin."""

    def texts(given: Texts) -> dict[str, Any]:
        plain = asdict(given) | {"votes": told(given.votes, VOTE_STARTS), "lengths": told(given.lengths, LENGTH_STARTS)}
        return {"count": given.count, **plain}

    def told(spread: Spread, starts: Sequence[int]) -> dict[str, Any]:
        return {**spread.summary(), "histogram": [[one.low, one.high, one.count] for one in spread.bins(starts)]}

    return {
        "questions": texts(census.questions),
        "answers": texts(census.answers),
        "pairs": census.pairs_per_question.total,
        "accepted": census.accepted,
        "answers_per_question": told(census.answers_per_question, SMALL_STARTS),
        "pairs_per_question": told(census.pairs_per_question, SMALL_STARTS),
        "gaps": told(census.gaps, SMALL_STARTS),
        "splits": {split: dict(counts) for split, counts in census.splits.items()},
        "sites": [dict(zip(("site", "questions", "answers", "pairs"), site, strict=True)) for site in census.sites],
        "tags": dict(census.tags),
        "different_tags": census.different_tags,
        "baselines": census.baselines,
    }


def _texts(told: Mapping[str, Any]) -> Texts:
    return Texts(
        Spread(told["votes"]),
        Spread(told["lengths"]),
        dict(zip(CONTENT, told["content"], strict=True)),
        dict(sorted(told["years"].items())),
        dict(sorted(told["licenses"].items())),
        told["first"],
        told["last"],
    )


def _baselines(told: Mapping[str, Any], pairs: int) -> Row:
    row = {"rules": AS_THEY_ARE, "questions": told["compared"], "pairs": pairs}
    for name in ("longer", "earlier"):
        mean, deviation = told[name], told[f"{name}_deviation"]
        # Threads add in any order, so the last bits differ from time to time.
        row[f"{name}_wins"] = None if mean is None else round(mean, 9)
        row[f"{name}_error"] = None if mean is None else round(deviation / sqrt(told["compared"]), 9)
    return row
