"""The reward model's options: centring and the length penalty, by hand and by what they are for."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from stackllama.model.roles import LoRA, Role, Trunk
from stackllama.objectives import reward
from stackllama.objectives.base import Sums
from stackllama.tokens.batches import Batch, RewardRow
from stackllama.tokens.forest import Forest, Tree
from stackllama.tokens.sources import PairedTree, reward_row, reward_source
from tests.model.tiny import random_trees, tiny_model

ADAPTER = LoRA(4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj"))
CONTENTS, PENALTY = 16, 0.8


class Linear:
    """A role of two weights: a score is linear in a content, which the answer's tokens name, and in log(tokens)."""

    def __init__(self) -> None:
        self.weight_D = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def hidden_at(self, forest: Forest, places_N: Tensor) -> Tensor:
        """(content, log length) at each branch's last token, zeros elsewhere."""
        hidden_TD = torch.zeros(len(forest), 2, dtype=torch.float64)
        for branch in forest.branches:
            content = (int(forest.tokens_T[branch.start]) - CONTENTS / 2) / CONTENTS
            hidden_TD[branch.stop - 1] = torch.tensor([content, math.log(branch.length)], dtype=torch.float64)
        return hidden_TD[places_N]

    def score(self, _: str, hidden_ND: Tensor) -> Tensor:
        return hidden_ND @ self.weight_D


def sums_of(role: Linear, row: RewardRow, **options: float) -> Sums:
    return reward.RewardObjective("reward", **options)(cast("Role", role), row)


def pair(key: int, better: tuple[int, int], worse: tuple[int, int]) -> PairedTree:
    """A question with one pair; an answer is (content, tokens)."""
    branches = tuple((content,) * tokens for content, tokens in (better, worse))
    return PairedTree(Tree((0,), branches, key), ((0, 1),), (0.0,), (0, 1), 1.0, 1.0)


def voted(pairs: int, seed: int) -> list[PairedTree]:
    """Pairs whose voters like content, 6 a unit, and length, 1.5 for each natural log of tokens."""
    random = np.random.default_rng(seed)
    found = []
    for key in range(pairs):
        one, other = ((int(random.integers(CONTENTS)), int(random.integers(2, 40))) for _ in range(2))
        liked = 6 * (one[0] - other[0]) / CONTENTS + 1.5 * math.log(one[1] / other[1])
        better, worse = (one, other) if random.random() < 1 / (1 + math.exp(-liked)) else (other, one)
        found.append(pair(key, better, worse))
    return found


def trained(pairs: list[PairedTree], **options: float) -> list[float]:
    """The two weights at the minimum of the objective."""
    role, row = Linear(), reward_row(pairs)
    optimizer = torch.optim.LBFGS([role.weight_D], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss() -> float:
        optimizer.zero_grad()
        value = sums_of(role, row, **options).losses["pairwise_loss"] / len(pairs)
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return cast("list[float]", role.weight_D.tolist())


def accuracy(weights: list[float], pairs: list[PairedTree]) -> float:
    role = Linear()
    role.weight_D = torch.tensor(weights, dtype=torch.float64)
    return float(sums_of(role, reward_row(pairs)).metrics["accuracy"]) / len(pairs)


def test_a_length_penalty_takes_length_out_of_the_score_and_leaves_content() -> None:
    pairs = voted(1500, seed=0)
    plain, penalized = trained(pairs), trained(pairs, length_penalty=PENALTY)
    assert plain[1] == pytest.approx(1.5, abs=0.25)
    # (w_content, w_length) at penalty 0 gives the same loss as (w_content, w_length - c) at penalty c.
    assert penalized == pytest.approx([plain[0], plain[1] - PENALTY], abs=1e-3)
    others = voted(1500, seed=1)
    matched = [one for one in others if abs(float(reward_row([one]).length_ratio_P)) < 0.2]
    assert len(matched) > 100
    assert accuracy(penalized, matched) >= accuracy(plain, matched) - 0.01
    assert accuracy(penalized, matched) > 0.7


def test_centring_and_length_penalty_worked_by_hand() -> None:
    # Scores are content + log(tokens). Contents 12 and 4 of 16 are 0.25 and -0.25. One question of weight 3, pair
    # weight 3, margin 0.5: better (12, 2 tokens) scores 0.25 + ln 2 = 0.94315, worse (4, 6 tokens) -0.25 + ln 6 =
    # 1.54176. Gap -0.59861, log ratio ln(1/3) = -1.09861; with penalty 2 the loss is -log sigmoid(-0.59861 - 0.5 -
    # 2.19722) = log(1 + exp(3.29583)) = 3.33220, three times: 9.99660. Centring: 2.48491 ^ 2 = 6.17477, three times:
    # 18.5243. Slope: -0.59861 / -1.09861 = 0.54488, its sums 3 * 0.65764 = 1.97292 over 3 * 1.20695 = 3.62085.
    one = pair(0, (12, 2), (4, 6))
    tree = PairedTree(one.tree, one.pairs, (0.5,), one.answers, 3.0, 3.0)
    role = Linear()
    role.weight_D = torch.ones(2, dtype=torch.float64)
    found = sums_of(role, reward_row([tree]), centring=0.1, length_penalty=2.0)
    assert {name: float(value) for name, value in found.losses.items()} == pytest.approx(
        {"pairwise_loss": 9.99660, "centring_loss": 18.5243}, rel=1e-5
    )
    assert float(found.metrics["length_slope"]) == pytest.approx(1.97292, rel=1e-5)
    batch = reward_source([tree], questions_per_step=1, row_tokens=64, epochs=1, max_steps=None, seed=0).next()
    assert batch is not None
    assert dict(batch.counts) == pytest.approx({"questions": 3.0, "length_ratios": 3.62085}, rel=1e-5)


def test_the_centring_term_is_a_mean_over_questions_of_the_mean_over_pairs() -> None:
    # All answers have 1 token, log 1 = 0, so scores are contents: 12, 8, 4 of 16 are 0.25, 0 and -0.25. The pairs of
    # the first question sum to 0.25, 0 and -0.25: mean of squares 0.125 / 3. The second's one pair, 12 over 12, sums
    # to 0.5: 0.25. Sum over questions 0.291667.
    first = PairedTree(Tree((0,), ((12,), (8,), (4,)), 0), ((0, 1), (0, 2), (1, 2)), (0.0,) * 3, (0, 1, 2), 1 / 3, 1.0)
    role = Linear()
    role.weight_D = torch.ones(2, dtype=torch.float64)
    found = sums_of(role, reward_row([first, pair(1, (12, 1), (12, 1))]), centring=1.0)
    assert float(found.losses["centring_loss"]) == pytest.approx(0.291667, rel=1e-5)


def test_pairs_of_equal_length_give_a_slope_of_0() -> None:
    batch = reward_source(
        [pair(0, (12, 3), (4, 3))], questions_per_step=1, row_tokens=64, epochs=1, max_steps=None, seed=0
    ).next()
    assert isinstance(batch, Batch)
    assert float(sums_of(Linear(), batch.rows[0]).metrics["length_slope"]) / batch.counts["length_ratios"] == 0.0


def test_without_centring_there_is_one_term_and_with_it_its_coefficient() -> None:
    assert list(reward.RewardObjective("reward", length_penalty=1.0).terms) == ["pairwise_loss"]
    terms = reward.RewardObjective("reward", centring=0.01).terms
    assert {name: term.coefficient for name, term in terms.items()} == {"pairwise_loss": 1.0, "centring_loss": 0.01}


def test_losses_and_gradient_with_both_options_do_not_depend_on_how_questions_are_packed() -> None:
    trees = [
        PairedTree(tree, ((0, 1), (1, 0)), (0.0, 0.5), tuple(range(len(tree.branches))), 0.5, 1.0)
        for tree in random_trees(4, trees=12)
        if len(tree.branches) > 1
    ]
    assert len(trees) > 2
    objective = reward.RewardObjective("reward", centring=0.1, length_penalty=0.3)
    found = []
    for rows in ([trees], [[tree] for tree in trees], [trees[::-1]], [trees[:2], trees[2:]]):
        trunk = Trunk(tiny_model(), precision=torch.float32)
        trunk.add_adapter("reward", ADAPTER, seed=0)
        trunk.add_head("reward", reward.HEAD, spread=0.2, seed=1)
        losses = torch.zeros(2)
        with trunk.use("reward", training=True) as role:
            for row in rows:
                sums = objective(role, reward_row(row))
                sum(sums.losses.values(), torch.zeros(())).backward()
                losses += torch.stack([sums.losses[name].detach() for name in objective.terms])
        gradients = [p.grad.flatten() for p in trunk.trainable("reward").values() if p.grad is not None]
        found.append(torch.cat([losses, *gradients]))
    for other in found[1:]:
        assert (other[:2] - found[0][:2]).norm() <= 1e-6 * found[0][:2].norm()
        assert (other[2:] - found[0][2:]).norm() <= 2e-6 * found[0][2:].norm()


def test_a_fitted_head_heeds_the_length_penalty() -> None:
    # One pair as in test_losses.py, z = 6.84 where the loss asks for no gap. The better answer has e times as many
    # tokens as nearly as can be, 19 against 7: log(19 / 7) = 0.99853. With penalty 5 the head's margin z minimizes
    # log(1 + exp(-z - 4.99264)) + 0.01 / 2 * z^2 / 64: sigmoid(-z - 4.99264) = z / 6400, z = 2.73, by trial:
    # sigmoid(-7.72264) = 0.00044250, 2.73 / 6400 = 0.00042656; z = 2.76: 0.00042943, 0.00043125; z = 2.757: 0.00043072,
    # 0.00043078.
    trunk = Trunk(tiny_model(), precision=torch.float32)
    trunk.add_adapter("reward", ADAPTER, seed=0)
    trunk.add_head("reward", reward.HEAD, spread=0.2, seed=1)
    tree = Tree((5, 6), ((7,) * 6 + (2,), (8,) * 18 + (2,)), 0)
    row = reward_row([PairedTree(tree, ((1, 0),), (0.0,), (0, 1), 1.0, 1.0)])
    reward.fit_head(trunk, "reward", [row], length_penalty=5.0)
    with trunk.use("reward") as role:
        scores = role.score(reward.HEAD, role.hidden_at(row.forest, row.last_B))
    assert float(scores[1] - scores[0]) == pytest.approx(2.757, abs=0.01)
