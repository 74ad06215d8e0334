"""Scores of pairs are those of their trees read alone, and centring moves nothing but the mean."""

from __future__ import annotations

import pytest
import torch

from stackllama.evaluate.preference import answer_scores, center_rewards, judge_pairs
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives.reward import HEAD
from stackllama.tokens.forest import Tree, last_tokens, plant
from stackllama.tokens.sources import PairedTree
from tests.model.tiny import tiny_model


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


def test_each_answer_of_a_pair_has_one_score() -> None:
    trunk = reward_trunk()
    found = answer_scores(judge_pairs(trunk, "reward", TREES, row_tokens=64))
    assert set(found) == {(0, 0), (0, 1), (0, 2), (4, 3), (4, 1)}
    assert [found[0, at] for at in range(3)] == pytest.approx(scores(trunk, TREES[0].tree), abs=1e-5)
