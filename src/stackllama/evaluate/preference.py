"""What a reward model says of pairs of answers; `audit.py` says what that is worth.

Legend: P pairs, B branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

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
