"""The reward model's audit: what its accuracy is made of, on pairs that it never learned from.

One accuracy hides how it came about. A model that has learned no more than that long answers win has one above a half
on any site, so the audit asks where length speaks against the better answer; by score gap, site, tag, code and length;
what a bag of words knows; whether the margins can be read as probabilities. Every number is a mean over questions of
the mean over their pairs, with an interval that resamples questions.

Legend: P pairs, Q questions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from stackllama.data.pairs.rules import earlier_wins, longer_wins, shown_length
from stackllama.data.posts import Answer, Pair, Question
from stackllama.errors import DataError
from stackllama.evaluate.preference import JudgedPair
from stackllama.evaluate.statistics import Interval, Resampling, interval, paired_difference, question_means, wins

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MOST_LABELS = 8
"""At most so many sites, and so many tags, are told apart: the most frequent."""
BINS, FEWEST = 10, 50
"""Bins of a reliability curve at most, and questions in each on average at least."""
COIN = 0.5
LONGER, EARLIER = "the longer answer wins", "the earlier answer wins"
"""Baselines that are told of every model, whatever they say; others only where they say something of some pair."""
HOTTEST = 100.0
"""Where an interval of a temperature ends, if it has no end."""
FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
"""A line that begins, or ends, a block of code in Markdown."""

_RATIOS = (("under a half", 0.5), ("a half to 4/5", 0.8), ("4/5 to 5/4", 1.25), ("5/4 to 2 times", 2.0))


@dataclass(frozen=True, slots=True)
class Slice:
    """Accuracy on some of the pairs. accuracy: None where fewer than two questions have one."""

    label: str
    accuracy: Interval | None
    questions: int
    pairs: int


@dataclass(frozen=True, slots=True)
class Baseline:
    """A rule without a model of language, on the same pairs. over: accuracy of the reward model - of the rule."""

    label: str
    accuracy: Interval
    over: Interval


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose probabilities are alike: the mean probability that the model gives its choice, how often the choice
    was right, and the share of all weight that lies here.
    """

    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far margins are log-odds, as the loss takes them to be.

    error: expected calibration error, the mean distance of confidence and accuracy over the bins; of chance alone it is
    above 0. temperature: what margins are to be divided by for the likelihood to be highest, above 1 where the model is
    too sure; None where none is: no margin is other than 0, all pairs are ranked right, or as many or more wrong than
    right. loss and loss_tempered: mean negative log-likelihood in nats as it is, and at that temperature (a coin has
    0.693).
    """

    bins: tuple[Bin, ...]
    error: float
    temperature: Interval | None
    loss: float
    loss_tempered: float | None


@dataclass(frozen=True, slots=True)
class Audit:
    """Everything; `slices` by what they are cut by. against_length, with_length: accuracy where the better answer is
    the shorter one, and the longer one; None where fewer than two questions have such a pair.
    """

    accuracy: Interval
    baselines: tuple[Baseline, ...]
    slices: Mapping[str, tuple[Slice, ...]]
    against_length: Interval | None
    with_length: Interval | None
    calibration: Calibration
    questions: int
    pairs: int

    def baseline(self, label: str) -> Baseline:
        """The baseline of that label, `LONGER` or `EARLIER`."""
        return next(one for one in self.baselines if one.label == label)


def audit(
    questions: Sequence[Question],
    judged: Sequence[JudgedPair],
    *,
    words: Floats | None,
    how: Resampling,
) -> Audit:
    """Audit a reward model by what it says of held-out pairs.

    words: for each pair, the score of the better answer minus that of the worse one by a bag of words that was fitted
    on the model's own training split (P,); None where there is none. how: intervals are made.

    Raises:
        DataError: for pairs of fewer than two questions, which no interval can be made of.
    """
    owner_P = np.array([one.question for one in judged])
    if len(set(owner_P.tolist())) < 2:
        raise DataError(
            f"the held-out pairs are of {len(set(owner_P.tolist()))} questions, at least 2 are needed; raise "
            "reward.max_answer_tokens or data.splits.eval, or give more data"
        )
    margin_P = np.array([one.margin for one in judged])
    right_P = wins(margin_P, np.zeros(len(judged)))
    right_Q = question_means(right_P, owner_P)
    rules = {label: _each(questions, judged, rule) for label, rule in _RULES.items()}
    rules = {
        label: found_P for label, found_P in rules.items() if label in (LONGER, EARLIER) or (found_P != COIN).any()
    }
    if words is not None:
        rules["bag of words"] = wins(words, np.zeros(len(judged)))
    baselines = []
    for label, found_P in rules.items():
        found_Q = question_means(found_P, owner_P)
        baselines.append(Baseline(label, interval(found_Q, **how), paired_difference(right_Q, found_Q, **how)))

    def cut(label: str, mask_P: Mask) -> Slice:
        found_Q = question_means(right_P[mask_P], owner_P[mask_P])
        accuracy = interval(found_Q, **how) if len(found_Q) > 1 else None
        return Slice(label, accuracy, len(found_Q), int(mask_P.sum()))

    longer_P = _each(questions, judged, longer_wins)
    return Audit(
        accuracy=interval(right_Q, **how),
        baselines=tuple(baselines),
        slices={
            name: tuple(one for label, mask in masks if (one := cut(label, mask)).pairs)
            for name, masks in _masks(questions, judged).items()
        },
        against_length=cut("against length", longer_P == 0).accuracy,
        with_length=cut("with length", longer_P == 1).accuracy,
        calibration=calibrate(margin_P, owner_P, confidence=how["confidence"]),
        questions=len(right_Q),
        pairs=len(judged),
    )


def calibrate(margin_P: Floats, owner_P: NDArray[np.int64], *, confidence: float) -> Calibration:
    """How far margins are log-odds. owner_P: the question of each pair; questions weigh the same.

    Guo et al. 2017, "On calibration of modern neural networks": expected calibration error and temperature, here over
    bins of about the same weight. Of a pair the model chooses the answer with the higher score, with probability
    sigmoid(|margin|); at a margin of 0 the choice is right by half.
    """
    weight_P = (1.0 / np.bincount(owner_P)[owner_P]) / len(np.unique(owner_P))
    right_P = wins(margin_P, np.zeros(len(margin_P)))
    sure_P = 1.0 / (1.0 + np.exp(-np.abs(margin_P)))
    bins = list(_bins(sure_P, right_P, weight_P, len(np.unique(owner_P))))
    temperature = _temperature(margin_P, weight_P, owner_P, confidence)
    return Calibration(
        tuple(bins),
        error=sum(one.share * abs(one.confidence - one.accuracy) for one in bins),
        temperature=temperature,
        loss=_loss(margin_P, weight_P, 1.0),
        loss_tempered=None if temperature is None else _loss(margin_P, weight_P, temperature.mean),
    )


def _bins(sure_P: Floats, right_P: Floats, weight_P: Floats, questions: int) -> Iterator[Bin]:
    """Pairs by how sure the model is, in bins of about the same weight; pairs of one probability are never parted, as
    their order would decide then.
    """
    count = min(BINS, max(1, questions // FEWEST))
    level_P = np.unique(sure_P, return_inverse=True)[1].reshape(-1)
    weight_L = np.bincount(level_P, weights=weight_P)
    bin_L = np.minimum((np.cumsum(weight_L) - weight_L / 2) * count, count - 1).astype(int)
    for at in range(count):
        inside = bin_L[level_P] == at
        if share := float(weight_P[inside].sum()):
            sure, right = (float((each[inside] * weight_P[inside]).sum()) / share for each in (sure_P, right_P))
            yield Bin(sure, right, share)


def _loss(margin_P: Floats, weight_P: Floats, temperature: float) -> float:
    """Mean negative log-likelihood of the better answers, log(1 + exp(-margin / temperature)), in nats."""
    return float((weight_P * np.logaddexp(0.0, -margin_P / temperature)).sum())


def _temperature(margin_P: Floats, weight_P: Floats, owner_P: NDArray[np.int64], confidence: float) -> Interval | None:
    """The temperature of the least loss, with its interval; None where there is none.

    The loss is convex in the inverse temperature b: bisection on its slope, from none (b = 0) to where the largest
    margin counts a hundred nats. The interval is Wald's in b, with the variance of the slope taken over questions (the
    sandwich: they are independent, their pairs are not).
    """
    largest = float(np.abs(margin_P).max())
    if largest == 0 or (margin_P >= 0).all() or (weight_P * margin_P).sum() <= 0:
        return None
    low, high = 0.0, 100.0 / largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _slopes(margin_P, middle) @ weight_P < 0 else (low, middle)
    inverse = (low + high) / 2
    slope_Q = np.bincount(owner_P, weights=weight_P * _slopes(margin_P, inverse))
    chance_P = 1.0 / (1.0 + np.exp(inverse * margin_P))
    curvature = float((weight_P * margin_P**2 * chance_P * (1 - chance_P)).sum())
    spread = math.sqrt(float(np.square(slope_Q).sum())) / max(curvature, float(np.finfo(np.float64).tiny))
    away = NormalDist().inv_cdf(0.5 + confidence / 2) * spread
    ends = 1 / (inverse + away), 1 / max(inverse - away, 1 / HOTTEST)
    return Interval(1 / inverse, min(ends[0], 1 / inverse), max(ends[1], 1 / inverse))


def _slopes(margin_P: Floats, inverse: float) -> Floats:
    """Derivative of each pair's log(1 + exp(-b margin)) by b."""
    found: Floats = -margin_P / (1.0 + np.exp(inverse * margin_P))
    return found


def has_code(answer: Answer) -> bool:
    """Whether an answer has a fenced block of code."""
    return FENCE.search(answer.text) is not None


def code_wins(question: Question, pair: Pair) -> float:
    """1 if the better answer alone has code, 0 if the worse one alone has, else one half."""
    better, worse = (has_code(question.answers[at]) for at in (pair.better, pair.worse))
    return 0.5 + 0.5 * (float(better) - float(worse))


_RULES: Mapping[str, Callable[[Question, Pair], float]] = {
    LONGER: longer_wins,
    EARLIER: earlier_wins,
    "the answer with code wins": code_wins,
}


def _each(
    questions: Sequence[Question], judged: Sequence[JudgedPair], rule: Callable[[Question, Pair], float]
) -> Floats:
    return np.array([rule(questions[one.question], Pair(one.better, one.worse, 1)) for one in judged])


def _masks(questions: Sequence[Question], judged: Sequence[JudgedPair]) -> dict[str, list[tuple[str, Mask]]]:
    """What pairs are cut by -> (label, which pairs)."""
    gaps = {
        (at, pair.better, pair.worse): pair.gap
        for at in {one.question for one in judged}
        for pair in questions[at].pairs
    }
    gap_P = np.array([gaps[one.question, one.better, one.worse] for one in judged])
    asked = [questions[one.question] for one in judged]
    answers = [(q.answers[one.better], q.answers[one.worse]) for q, one in zip(asked, judged, strict=True)]
    coded_P = np.array([has_code(better) or has_code(worse) for better, worse in answers])
    ratio_P = np.array([(1 + shown_length(better)) / (1 + shown_length(worse)) for better, worse in answers])
    edges = [0.0, *(edge for _, edge in _RATIOS), math.inf]
    lengths = zip([*(label for label, _ in _RATIOS), "over 2 times"], edges, edges[1:], strict=False)
    found = {
        "score gap": [(str(gap), gap_P == gap) for gap in (1, 2, 3)] + [("4 and more", gap_P > 3)],
        "length of the better answer over the worse": [
            (label, (ratio_P > low) & (ratio_P <= high)) for label, low, high in lengths
        ],
        "code": [("in either answer", coded_P), ("in neither", ~coded_P)],
        "tag": _frequent([question.tags for question in asked]),
        "site": _frequent([(question.site,) for question in asked]),
    }
    return {name: masks for name, masks in found.items() if sum(bool(mask.any()) for _, mask in masks) > 1}


def _frequent(labels_P: Sequence[Sequence[str]]) -> list[tuple[str, Mask]]:
    """(label, which pairs have it), the most frequent first."""
    counts = Counter(label for labels in labels_P for label in labels)
    frequent = sorted(counts, key=lambda label: (-counts[label], label))[:MOST_LABELS]
    return [(label, np.array([label in labels for labels in labels_P])) for label in frequent]
