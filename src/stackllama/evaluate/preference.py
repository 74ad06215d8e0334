"""Whether a reward model tells better answers from worse, beside what needs no model: the longer answer, the earlier
answer.

All three are judged on the same pairs. An accuracy is the mean over questions of the mean over their pairs; a
comparison is an interval of the paired difference, resampled over questions.

Legend: P pairs, B branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stackllama.data.pairs.rules import earlier_wins, longer_wins
from stackllama.data.posts import Pair, Question
from stackllama.errors import DataError
from stackllama.evaluate.statistics import Interval, interval, paired_difference, question_means, wins
from stackllama.model.roles import Trunk
from stackllama.objectives.reward import HEAD
from stackllama.tokens.packing import pack
from stackllama.tokens.sources import PairedTree, reward_row

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair as the model scores it: its question and answers (places in the list of questions, and in the question's
    answers), and the score of each.
    """

    question: int
    better: int
    worse: int
    better_score: float
    worse_score: float

    @property
    def margin(self) -> float:
        """The score of the better answer minus that of the worse one."""
        return self.better_score - self.worse_score


@dataclass(frozen=True, slots=True)
class PreferenceExam:
    """Accuracies in [0, 1] with intervals over the questions, and the paired differences over the baselines."""

    accuracy: Interval
    longer_wins: Interval
    earlier_wins: Interval
    over_longer: Interval
    over_earlier: Interval
    questions: int
    pairs: int


def judge_pairs(trunk: Trunk, role: str, trees: Sequence[PairedTree], *, row_tokens: int) -> list[JudgedPair]:
    """Score every pair under a reward role."""
    judged: list[JudgedPair] = []
    with trunk.use(role) as scorer:
        for packed in pack(trees, row_tokens):
            row = reward_row(packed)
            score_B = scorer.score(HEAD, scorer.hidden_at(row.forest, row.last_B))
            scores = zip(score_B[row.better_P].tolist(), score_B[row.worse_P].tolist(), strict=True)
            places = [(one.tree.key, one.answers[b], one.answers[w]) for one in packed for b, w in one.pairs]
            judged += [JudgedPair(*place, *pair) for place, pair in zip(places, scores, strict=True)]
    return judged


def answer_scores(judged: Sequence[JudgedPair]) -> dict[tuple[int, int], float]:
    """(question, answer) -> score, of every answer that stands in a pair."""
    better = {(one.question, one.better): one.better_score for one in judged}
    return better | {(one.question, one.worse): one.worse_score for one in judged}


def examine(
    questions: Sequence[Question],
    judged: Sequence[JudgedPair],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> PreferenceExam:
    """Accuracy of the judged pairs beside the baselines on the same pairs.

    Raises:
        DataError: when no pair was judged.
    """
    if not judged:
        raise DataError(
            "no held-out pair is short enough to be judged; raise reward.max_answer_tokens or give more data"
        )
    owner_P = np.array([pair.question for pair in judged])
    right_P = wins([pair.margin for pair in judged], np.zeros(len(judged)))
    longer_P, earlier_P = (
        np.array([rule(questions[one.question], Pair(one.better, one.worse, 1)) for one in judged])
        for rule in (longer_wins, earlier_wins)
    )
    right_Q, longer_Q, earlier_Q = (question_means(values, owner_P) for values in (right_P, longer_P, earlier_P))

    def over(values_Q: Floats) -> Interval:
        return interval(values_Q, resamples=resamples, confidence=confidence, seed=seed)

    def beyond(baseline_Q: Floats) -> Interval:
        return paired_difference(right_Q, baseline_Q, resamples=resamples, confidence=confidence, seed=seed)

    return PreferenceExam(
        accuracy=over(right_Q),
        longer_wins=over(longer_Q),
        earlier_wins=over(earlier_Q),
        over_longer=beyond(longer_Q),
        over_earlier=beyond(earlier_Q),
        questions=len(right_Q),
        pairs=len(judged),
    )


def center_rewards(trunk: Trunk, role: str, trees: Sequence[PairedTree], *, row_tokens: int) -> None:
    """Shift a finished reward model so that its mean over the answers of these trees is 0 (Stiennon et al. 2020,
    section 3.4).

    Differences, and so accuracies, stay as they are; PPO's value head, which starts at 0, starts near the truth.
    """
    scores: list[torch.Tensor] = []
    with trunk.use(role) as scorer:
        for packed in pack(trees, row_tokens):
            row = reward_row(packed)
            scores.append(scorer.score(HEAD, scorer.hidden_at(row.forest, row.last_B)))
    with torch.no_grad():
        trunk.trainable(role)[f"head.{HEAD}.bias"].sub_(torch.cat(scores).mean())
