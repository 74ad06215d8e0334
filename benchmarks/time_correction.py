"""How much earlier and longer answers are favoured, under each way of counting dated votes. Real dumps with Votes.xml.

    python benchmarks/time_correction.py DUMP...

Prints, for each way and over all dumps together, how often the earlier and the longer answer of a pair is the better
one: the mean over questions of the mean over their pairs, with its standard error. One half is no bias. The last line
is one JSON object. docs/decisions/0014-time-correction.md says what was concluded.

Ways: all votes; votes from the later answer's day on, and 1, 2, ... days after it; votes in windows of equal length
after each answer's own day; without dates: answers posted within a few days of each other, votes for each day that an
answer has been there, and the share of the earlier answer's votes that falls to the time of the later one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stackllama.data.building.gathering import gather
from stackllama.data.building.joining import VOTES, join_bucket, read_joined
from stackllama.data.building.keys import join_keys
from stackllama.data.building.workers import open_workers
from stackllama.data.dump.archive import open_tables
from stackllama.data.dump.pieces import Source
from stackllama.data.pairs.nesting import to_answers
from stackllama.data.pairs.pairing import Answers, Pairs, choose
from stackllama.data.pairs.rules import PairRules
from stackllama.data.pairs.votes import day_number

Numbers = NDArray[np.int64]
Lead = Callable[[Answers, Numbers, Numbers, Numbers], NDArray[Any]]
"""(answers, day of each, one side of the pairs, the other) -> by how much the first is ahead."""
PLAIN = PairRules(score="votes", max_pairs=1000)


@dataclass(frozen=True)
class Bias:
    """Question means of one way: the site of each question, and how often the earlier and the longer answer won."""

    site_Q: NDArray[np.str_]
    earlier_Q: NDArray[np.float64]
    longer_Q: NDArray[np.float64]

    def told(self, chosen_Q: NDArray[np.bool_] | None = None) -> dict[str, float]:
        some = np.ones(len(self.site_Q), bool) if chosen_Q is None else chosen_Q
        told: dict[str, float] = {"questions": int(some.sum())}
        for name, values_Q in (("earlier", self.earlier_Q[some]), ("longer", self.longer_Q[some])):
            told[name] = round(float(values_Q.mean()), 4)
            told[f"{name}_error"] = round(float(values_Q.std() / np.sqrt(max(1, len(values_Q)))), 4)
        return told


def read(dump: Path) -> Answers:
    """All answers of a dump with their dated votes."""
    with TemporaryDirectory() as folder, open_workers("local", 1) as over, open_tables(dump) as tables:
        source = Source(0, str(dump), tables.site)
        gathered = gather([source], Path(folder), over, allow_truncated=False, tell=lambda *_: None)
        join_keys(Path(folder), threads=1)
        if gathered.buckets != 1:
            raise SystemExit(f"{dump} is too large for this measurement; give a site of less than 30 MB")
        joined = join_bucket(Path(folder), gathered.posts, 0)
        return to_answers(joined, read_joined(Path(folder), VOTES, 0))


def bias(dumps: Iterable[tuple[Answers, Pairs]]) -> Bias:
    sites, earlier, longer = [], [], []
    for answers, pairs in dumps:
        better, worse = (answers.starts[pairs.question_P] + side for side in (pairs.better_P, pairs.worse_P))
        date_A = np.unique(np.array(answers.date_A), return_inverse=True)[1]
        wins = (
            (np.sign(first - second) + 1) / 2
            for first, second in (
                (date_A[worse], date_A[better]),
                (answers.length_A[better], answers.length_A[worse]),
            )
        )
        asked, first_P, size = np.unique(pairs.question_P, return_inverse=True, return_counts=True)
        means = [np.bincount(first_P, won, minlength=len(asked)) / size for won in wins]
        sites.append(np.array([answers.keys[at][0] for at in asked.tolist()]))
        earlier.append(means[0])
        longer.append(means[1])
    return Bias(np.concatenate(sites), np.concatenate(earlier), np.concatenate(longer))


def judged(answers: Answers, lead: Lead) -> Pairs:
    """Every pair of a question, judged by `lead`."""
    size_Q = np.diff(answers.starts)
    rows = [
        (question, start + a, start + b)
        for question, (start, size) in enumerate(zip(answers.starts.tolist(), size_Q.tolist(), strict=False))
        for a in range(size)
        for b in range(a + 1, size)
    ]
    question_P, one_P, other_P = np.array(rows, np.int64).T
    day_A = np.array([day_number(moment) for moment in answers.date_A], np.int64)
    lead_P = lead(answers, day_A, one_P, other_P)
    start_P = answers.starts[question_P]
    better = np.where(lead_P > 0, one_P, other_P) - start_P
    worse = np.where(lead_P > 0, other_P, one_P) - start_P
    pairs = Pairs(question_P, better, worse, np.abs(np.sign(lead_P)).astype(np.int64))
    return pairs.some(lead_P != 0)


def windows(days: int, skip: int = 0) -> Lead:
    """Votes in windows of equal length after each answer's own day; the window ends where the votes do."""

    def lead(answers: Answers, day_A: Numbers, one_P: Numbers, other_P: Numbers) -> Numbers:
        ballots = answers.ballots
        assert ballots is not None
        last = int(day_A.max())
        length_P = np.minimum(days, last - np.maximum(day_A[one_P], day_A[other_P]))
        sums = [
            ballots.since(side, day_A[side] + skip) - ballots.since(side, day_A[side] + np.maximum(length_P, skip))
            for side in (one_P, other_P)
        ]
        return sums[0] - sums[1]

    return lead


def per_day(answers: Answers, day_A: Numbers, one_P: Numbers, other_P: Numbers) -> NDArray[np.float64]:
    """Votes for each day that an answer has been there, until the day of the last answer."""
    rate_A = answers.votes_A / (int(day_A.max()) - day_A + 1)
    return rate_A[one_P] - rate_A[other_P]


def share(answers: Answers, day_A: Numbers, one_P: Numbers, other_P: Numbers) -> Numbers:
    """All votes of the later answer, and of the earlier one the share of its time that the later one was there."""
    time_A = (int(day_A.max()) + 1 - day_A).astype(float)
    short_P = np.minimum(time_A[one_P], time_A[other_P])
    sums = [np.round(answers.votes_A[side] * short_P / time_A[side]).astype(np.int64) for side in (one_P, other_P)]
    return sums[0] - sums[1]


def ways(dumps: Sequence[Answers]) -> dict[str, Bias]:
    undated = [replace(answers, ballots=None) for answers in dumps]

    def by(rules: PairRules, given: Sequence[Answers] = dumps) -> Bias:
        return bias((answers, choose(answers, rules)[0]) for answers in given)

    found = {"all votes": by(PLAIN), "original score rule": by(PairRules(max_pairs=1000))}
    since = replace(PLAIN, time="since_later")
    for skip in (0, 1, 2, 3, 7):
        found[f"votes since the later answer's day + {skip}"] = by(replace(since, skip_days=skip))
    for skip in (0, 1, 2):
        rules = PairRules(max_pairs=1000, time="since_later", skip_days=skip)
        found[f"original score rule on votes since + {skip}"] = by(rules)
    found["original score rule on votes since, no conflicts"] = by(
        PairRules(max_pairs=1000, time="since_later", conflict="drop")
    )
    found["original score rule on votes since, votes decide"] = by(
        PairRules(max_pairs=1000, time="since_later", conflict="votes")
    )
    for days in (3, 7, 30, 90, 365, 730):
        found[f"windows of {days} days"] = bias((one, judged(one, windows(days))) for one in dumps)
    for skip in (1, 7):
        found[f"windows of 365 days, the first {skip} left out"] = bias(
            (one, judged(one, windows(365, skip))) for one in dumps
        )
    for days in (0, 1, 3, 7, 30):
        found[f"undated, posted within {days} days"] = by(replace(PLAIN, posted_within_days=days), undated)
    found["undated, votes per day"] = bias((one, judged(one, per_day)) for one in dumps)
    found["undated, the earlier answer's share of votes"] = bias((one, judged(one, share)) for one in dumps)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="+", type=Path, help="folders of tables or .7z archives with Votes.xml")
    options = parser.parse_args(arguments)
    found = ways([read(dump) for dump in options.dumps])
    sites = sorted(set(found["all votes"].site_Q))
    print(f"{'way':<52}{'questions':>10}{'earlier':>16}{'longer':>16}  earlier on {', '.join(sites)}")
    for way, one in found.items():
        told = one.told()
        each = [one.told(one.site_Q == site)["earlier"] for site in sites]
        print(
            f"{way:<52}{told['questions']:>10}{told['earlier']:>9.3f} ±{told['earlier_error']:.3f}"
            f"{told['longer']:>9.3f} ±{told['longer_error']:.3f}  {'  '.join(f'{number:.3f}' for number in each)}"
        )
    numbers: Mapping[str, object] = {way: one.told() for way, one in found.items()}
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
