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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
BINS = 10
COIN = 0.5
COLDEST, HOTTEST = 0.01, 100.0
"""Ends of the temperatures that are tried: where every pair is ranked right, none is cold enough."""

_CODE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
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
    """A rule without a model of language, on the same pairs; one that says nothing of any pair is left out. over:
    accuracy of the reward model - of the rule.
    """

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

    error: expected calibration error, the mean distance of confidence and accuracy over the bins; temperature: what
    margins are to be divided by for the likelihood to be highest, above 1 where the model is too sure; loss and
    loss_tempered: mean negative log-likelihood in nats as it is, and at that temperature (a coin has 0.693).
    """

    bins: tuple[Bin, ...]
    error: float
    temperature: float
    loss: float
    loss_tempered: float


@dataclass(frozen=True, slots=True)
class Audit:
    """Everything; `slices` by what they are cut by. against_length: accuracy where the better answer is the shorter
    one; None where fewer than two questions have such a pair.
    """

    accuracy: Interval
    baselines: tuple[Baseline, ...]
    slices: Mapping[str, tuple[Slice, ...]]
    against_length: Interval | None
    calibration: Calibration
    questions: int
    pairs: int


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
    rules = {label: found_P for label, found_P in rules.items() if (found_P != COIN).any()}
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

    against = cut("against length", _each(questions, judged, longer_wins) == 0)
    return Audit(
        accuracy=interval(right_Q, **how),
        baselines=tuple(baselines),
        slices={
            name: tuple(one for label, mask in masks if (one := cut(label, mask)).pairs)
            for name, masks in _masks(questions, judged).items()
        },
        against_length=against.accuracy,
        calibration=calibrate(margin_P, owner_P),
        questions=len(right_Q),
        pairs=len(judged),
    )


def calibrate(margin_P: Floats, owner_P: NDArray[np.int64]) -> Calibration:
    """How far margins are log-odds. owner_P: the question of each pair; questions weigh the same.

    Guo et al. 2017, "On calibration of modern neural networks": expected calibration error and temperature, here over
    bins that hold the same weight. Of a pair the model chooses the answer with the higher score, with probability
    sigmoid(|margin|); at a margin of 0 the choice is right by half.
    """
    weight_P = (1.0 / np.bincount(owner_P)[owner_P]) / len(np.unique(owner_P))
    confidence_P = 1.0 / (1.0 + np.exp(-np.abs(margin_P)))
    right_P = wins(margin_P, np.zeros(len(margin_P)))
    order = np.argsort(confidence_P, kind="stable")
    place_P = np.minimum((np.cumsum(weight_P[order]) - weight_P[order] / 2) * BINS, BINS - 1).astype(int)
    bins = []
    for at in range(BINS):
        inside = order[place_P == at]
        if len(inside):
            share = float(weight_P[inside].sum())
            chosen, right = (
                float((values[inside] * weight_P[inside]).sum()) / share for values in (confidence_P, right_P)
            )
            bins.append(Bin(chosen, right, share))
    temperature = _temperature(margin_P, weight_P)
    return Calibration(
        tuple(bins),
        error=sum(one.share * abs(one.confidence - one.accuracy) for one in bins),
        temperature=temperature,
        loss=_loss(margin_P, weight_P, 1.0),
        loss_tempered=_loss(margin_P, weight_P, temperature),
    )


def _loss(margin_P: Floats, weight_P: Floats, temperature: float) -> float:
    """Mean negative log-likelihood of the better answers, log(1 + exp(-margin / temperature)), in nats."""
    return float((weight_P * np.logaddexp(0.0, -margin_P / temperature)).sum())


def _temperature(margin_P: Floats, weight_P: Floats) -> float:
    """The temperature of the least loss, which is convex in its inverse: bisection on the slope."""
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(60):
        middle = math.sqrt(low * high)
        slope = -(weight_P * margin_P / (1.0 + np.exp(np.clip(margin_P * middle, -500, 500)))).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def has_code(answer: Answer) -> bool:
    """Whether an answer has a fenced block of code."""
    return _CODE.search(answer.text) is not None


def code_wins(question: Question, pair: Pair) -> float:
    """1 if the better answer alone has code, 0 if the worse one alone has, else one half."""
    better, worse = (has_code(question.answers[at]) for at in (pair.better, pair.worse))
    return 0.5 + 0.5 * (float(better) - float(worse))


_RULES: Mapping[str, Callable[[Question, Pair], float]] = {
    "the longer answer wins": longer_wins,
    "the earlier answer wins": earlier_wins,
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
