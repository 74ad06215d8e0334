"""What a reward model makes of changes that leave an answer as good as it was, or that cost it: how its scores move.

Each change is made to all answers of the held-out pairs, which are scored again. Three are asked for: an answer cut to
half of its tokens, as a limit on length would; an answer whose end token is missing, so that it is read at its last
word; and Markdown noise, which changes how an answer looks and nothing that it says.

Legend: P pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stackllama.data.posts import Question
from stackllama.evaluate.audit import FENCE
from stackllama.evaluate.preference import JudgedPair
from stackllama.evaluate.statistics import Interval, Resampling, interval, paired_difference, question_means, wins
from stackllama.tokens.sources import PairedTree

_FIRST_WORD = re.compile(r"^([^\W\d_][^\W_]*)")


@dataclass(frozen=True, slots=True)
class Reaction:
    """What a change does. shift: to the scores of the changed answers, in standard deviations of the scores before;
    kept: share of the pairs that are ranked as before (ties count half); accuracy: changed - unchanged.
    """

    shift: Interval
    kept: Interval
    accuracy: Interval
    questions: int
    pairs: int


def react(before: Sequence[JudgedPair], after: Sequence[JudgedPair], how: Resampling) -> Reaction | None:
    """What changed between two scorings of the same pairs; pairs that are in one alone are left out (a changed text may
    outgrow its row). None where fewer than two questions are left, or all scores were the same.
    """
    found = {(one.question, one.better, one.worse): one for one in before}
    both = [(found[place], one) for one in after if (place := (one.question, one.better, one.worse)) in found]
    owner_P = np.array([one.question for one, _ in both])
    spread = float(_scores(before).std())
    if len(set(owner_P.tolist())) < 2 or spread == 0:
        return None
    old_P2, new_P2 = (_scores(each) for each in zip(*both, strict=True))
    old_P, new_P = (wins(scores[:, 0], scores[:, 1]) for scores in (old_P2, new_P2))
    shift_P = ((new_P2 - old_P2) / spread).mean(axis=1)
    kept_P = 1.0 - np.abs(new_P - old_P)
    shift_Q, kept_Q, old_Q, new_Q = (question_means(values, owner_P) for values in (shift_P, kept_P, old_P, new_P))
    return Reaction(
        shift=interval(shift_Q, **how),
        kept=interval(kept_Q, **how),
        accuracy=paired_difference(new_Q, old_Q, **how),
        questions=len(shift_Q),
        pairs=len(both),
    )


def cut_to_half(tree: PairedTree, eos_id: int) -> PairedTree:
    """Every answer keeps the first half of its tokens (rounded up), and its end."""
    return _with_branches(tree, lambda ids: (*ids[: -(-(len(ids) - 1) // 2)], eos_id))


def without_end(tree: PairedTree, eos_id: int) -> PairedTree:
    """No answer has its end token, but for one that is nothing else."""
    return _with_branches(tree, lambda ids: ids[:-1] if len(ids) > 1 and ids[-1] == eos_id else ids)


def with_noise(question: Question) -> Question:
    """The same question with `markdown_noise` in every answer."""
    answers = tuple(replace(answer, text=markdown_noise(answer.text)) for answer in question.answers)
    return replace(question, answers=answers)


def markdown_noise(text: str) -> str:
    """The text with the first word of each line in bold, where a line begins with a letter and is no code, and a rule
    below it.
    """
    lines, fenced = [], False
    for line in text.strip().splitlines():
        fence = FENCE.match(line) is not None
        fenced ^= fence
        lines.append(line if fenced or fence else _FIRST_WORD.sub(r"**\1**", line))
    return "\n".join([*lines, "", "---"])


CHANGES: Mapping[str, Callable[[PairedTree, int], PairedTree]] = {
    "cut to half": cut_to_half,
    "without their end": without_end,
}
"""Those that are made to the tokens; `with_noise` is made to the text."""


def _with_branches(tree: PairedTree, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> PairedTree:
    branches = tuple(change(branch) for branch in tree.tree.branches)
    return replace(tree, tree=replace(tree.tree, branches=branches))


def _scores(judged: Sequence[JudgedPair]) -> NDArray[np.float64]:
    """Scores of the better and of the worse answers (P, 2)."""
    return np.array([[one.better_score, one.worse_score] for one in judged])
