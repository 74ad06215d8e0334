"""The reward model's exam on scores worked by hand."""

from __future__ import annotations

import pytest
import torch

from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.errors import DataError
from stackllama.evaluate.preference import JudgedPair, center_rewards, examine, judge_pairs
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives.reward import HEAD
from stackllama.tokens.forest import Tree, last_tokens, plant
from stackllama.tokens.sources import PairedTree
from tests.model.tiny import tiny_model

WHO = Attribution("https://example/q/1", "Ann", 1, None, "CC BY-SA 4.0")
RESAMPLING = {"resamples": 500, "confidence": 0.95, "seed": 0}


def question(number: int, answers: list[tuple[str, str]]) -> Question:
    """Answers as (text, day)."""
    made = tuple(Answer(at, text, 0, False, day, WHO) for at, (text, day) in enumerate(answers))
    return Question("example", number, "t", "q", (), 0, "2020-01-01", WHO, made, (Pair(0, 1, 1),))


QUESTIONS = [
    question(1, [("long answer", "2020-01-01"), ("short", "2020-01-02"), ("middling", "2020-01-03")]),
    question(2, [("short", "2020-01-02"), ("long answer", "2020-01-01")]),
    question(3, [("same", "2020-01-02"), ("size", "2020-01-01")]),
]
JUDGED = [
    JudgedPair(0, 0, 1, 2.0, 0.0),  # right; longer and earlier
    JudgedPair(0, 2, 1, -1.0, 0.0),  # wrong; longer and later
    JudgedPair(1, 0, 1, 0.5, 0.0),  # right; shorter and later
    JudgedPair(2, 0, 1, 0.0, 0.0),  # a tie of scores and of lengths; later
]


def test_accuracies_are_means_over_questions_of_means_over_pairs() -> None:
    exam = examine(QUESTIONS, JUDGED, **RESAMPLING)  # type: ignore[arg-type]
    # Model: (1 + 0) / 2, 1, 1/2 -> mean 2/3. Longer: (1 + 1) / 2, 0, 1/2 -> 1/2. Earlier: (1 + 0) / 2, 0, 0 -> 1/6.
    assert exam.accuracy.mean == pytest.approx(2 / 3)
    assert exam.longer_wins.mean == pytest.approx(1 / 2)
    assert exam.earlier_wins.mean == pytest.approx(1 / 6)
    assert exam.over_longer.mean == pytest.approx(2 / 3 - 1 / 2)
    assert exam.over_earlier.mean == pytest.approx(2 / 3 - 1 / 6)
    assert (exam.questions, exam.pairs) == (3, 4)


def test_no_pair_at_all_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"reward\.max_answer_tokens"):
        examine(QUESTIONS, [], **RESAMPLING)  # type: ignore[arg-type]


def reward_trunk() -> Trunk:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    trunk.add_adapter("reward", LoRA(4, 8.0, 0.0, ("q_proj",)), seed=0)
    trunk.add_head("reward", HEAD, spread=0.3, seed=1)
    return trunk


TREES = [
    PairedTree(Tree((5, 6), ((7, 2), (8, 9, 2), (10, 2)), 0), ((0, 1), (2, 1)), (0.0, 0.0), (0, 1, 2), 0.5, 1.0),
    PairedTree(Tree((11, 12, 13), ((14, 2), (15, 2)), 4), ((1, 0),), (0.0,), (3, 1), 1.0, 1.0),
]


def scores(trunk: Trunk, tree: Tree) -> list[float]:
    forest = plant([tree])
    with trunk.use("reward") as role:
        found: list[float] = role.score(HEAD, role.hidden(forest)[last_tokens(forest)]).tolist()
    return found


def test_margins_are_scores_of_the_trees_alone_and_name_their_answers() -> None:
    trunk = reward_trunk()
    judged = {
        (one.question, one.better, one.worse): one.margin for one in judge_pairs(trunk, "reward", TREES, row_tokens=64)
    }
    first, second = scores(trunk, TREES[0].tree), scores(trunk, TREES[1].tree)
    assert judged == {
        (0, 0, 1): pytest.approx(first[0] - first[1], abs=1e-5),
        (0, 2, 1): pytest.approx(first[2] - first[1], abs=1e-5),
        (4, 1, 3): pytest.approx(second[1] - second[0], abs=1e-5),
    }


def test_centring_moves_the_mean_to_0_and_no_difference() -> None:
    trunk = reward_trunk()
    before = scores(trunk, TREES[0].tree)
    center_rewards(trunk, "reward", TREES, row_tokens=64)
    after = scores(trunk, TREES[0].tree)
    assert sum(after + scores(trunk, TREES[1].tree)) == pytest.approx(0.0, abs=1e-5)
    assert [a - after[0] for a in after] == pytest.approx([b - before[0] for b in before], abs=1e-5)
