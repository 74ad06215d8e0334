"""Objectives on worked numbers: PPO's two terms, the pairwise loss, the counts that make packing invisible."""

from __future__ import annotations

import math

import pytest
import torch

from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives import reward
from stackllama.objectives.ppo import policy_loss, value_loss
from stackllama.objectives.sft import SftObjective
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import PairedTree, reward_row, sft_row
from tests.model.tiny import random_trees, tiny_model

ADAPTER = LoRA(4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj"))


def test_policy_loss_worked_by_hand() -> None:
    # Ratios 1, 1.5, 0.5, 1.5 with clip 0.2, advantages 2, 1, -1, -1:
    #   A r = 2 -> loss -2;  min(1.5, 1.2) = 1.2 -> -1.2 (clipped);  min(-0.5, -0.8) = -0.8 -> 0.8 (clipped);
    #   min(-1.5, -1.2) = -1.5 -> 1.5 (not clipped: the bad action became likelier).
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    found = policy_loss(old + ratio.log(), old, torch.tensor([2.0, 1.0, -1.0, -1.0]), clip=0.2)
    assert found.tolist() == pytest.approx([-2.0, -1.2, 0.8, 1.5])


def test_value_loss_worked_by_hand() -> None:
    # old 0, return 1. v = 0.1: within 0.2, (0.9 ** 2) / 2 = 0.405. v = 0.6: clipped to 0.2, (0.8 ** 2) / 2 = 0.32 is
    # worse than (0.4 ** 2) / 2 = 0.08, so 0.32. v = -0.5: clipped to -0.2 gives 0.72, unclipped 1.125, so 1.125.
    found = value_loss(torch.tensor([0.1, 0.6, -0.5]), torch.zeros(3), torch.ones(3), clip=0.2)
    assert found.tolist() == pytest.approx([0.405, 0.32, 1.125])


def test_at_ratio_1_ppo_has_the_policy_gradient() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    action, advantage = torch.tensor([1, 0, 6, 3, 3]), torch.tensor([0.5, -1.0, 2.0, 0.0, -0.3])
    logprob = torch.log_softmax(logits, -1)[torch.arange(5), action]
    ppo_gradient = torch.autograd.grad(policy_loss(logprob, logprob.detach(), advantage, clip=0.2).sum(), logits)[0]
    # REINFORCE: d/dlogits of -A log pi(a) is A (softmax - onehot).
    expected = advantage[:, None] * (torch.softmax(logits.detach(), -1) - torch.nn.functional.one_hot(action, 7))
    assert torch.allclose(ppo_gradient, expected, atol=1e-6)


def reward_trunk() -> Trunk:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    trunk.add_adapter("reward", ADAPTER, seed=0)
    trunk.add_head("reward", reward.HEAD, spread=0.2, seed=1)
    return trunk


def test_reward_loss_is_the_mean_over_questions_of_the_mean_over_pairs() -> None:
    trunk = reward_trunk()
    # One question with three pairs of three answers, one with a single pair.
    trees = [
        PairedTree(
            Tree((5, 6), ((7, 2), (8, 2), (9, 2)), 0), ((0, 1), (0, 2), (1, 2)), (0.0,) * 3, (0, 1, 2), 1 / 3, 1.0
        ),
        PairedTree(Tree((10, 11), ((12, 2), (13, 14, 2)), 1), ((1, 0),), (0.0,), (0, 1), 1.0, 1.0),
    ]
    row = reward_row(trees)
    with trunk.use("reward") as role:
        sums = reward.RewardObjective("reward")(role, row)
        scores = role.score(reward.HEAD, role.hidden(row.forest)[row.last_B]).tolist()
    a, b, c, d, e = scores

    def pair(better: float, worse: float) -> float:
        return math.log(1 + math.exp(worse - better))

    expected = (pair(a, b) + pair(a, c) + pair(b, c)) / 3 + pair(e, d)
    assert float(sums.losses["pairwise_loss"]) == pytest.approx(expected, rel=1e-5)
    right = ((a > b) + (a > c) + (b > c)) / 3 + (e > d)
    assert float(sums.metrics["accuracy"]) == pytest.approx(right, abs=1e-6)


def test_margins_and_weights_in_the_loss() -> None:
    trunk = reward_trunk()
    trees = [
        PairedTree(Tree((5, 6), ((7, 2), (8, 2), (9, 2)), 0), ((0, 1), (2, 1)), (0.5, 2.0), (0, 1, 2), 1.5, 3.0),
        PairedTree(Tree((10, 11), ((12, 2), (13, 14, 2)), 1), ((1, 0),), (0.0,), (0, 1), 1.0, 1.0),
    ]
    with trunk.use("reward") as role:
        row = reward_row(trees)
        loss = float(reward.RewardObjective("reward")(role, row).losses["pairwise_loss"])
        a, b, c, d, e = role.score(reward.HEAD, role.hidden(row.forest)[row.last_B]).tolist()
    by_hand = 1.5 * math.log(1 + math.exp(b - a + 0.5)) + 1.5 * math.log(1 + math.exp(b - c + 2))
    assert loss == pytest.approx(by_hand + math.log(1 + math.exp(d - e)), rel=1e-5)


def test_a_fitted_head_on_one_pair_worked_by_hand() -> None:
    # One pair: every one of the 64 features is +1 or -1 once scaled, so the weights are all c, the margin is z = 64 c,
    # and the loss log(1 + exp(-z)) + 0.01 / 2 * 64 (z / 64)^2 is least where sigmoid(-z) = z / 6400: z = 6.84, by
    # trial: sigmoid(-6.84) = 0.0010689, 6.84 / 6400 = 0.0010688.
    trunk = reward_trunk()
    before = {name: tensor.clone() for name, tensor in trunk.state("reward").items()}
    row = reward_row([PairedTree(Tree((5, 6), ((7, 2), (8, 2)), 0), ((1, 0),), (0.0,), (0, 1), 1.0, 1.0)])
    reward.fit_head(trunk, "reward", [row])
    with trunk.use("reward") as role:
        scores = role.score(reward.HEAD, role.hidden(row.forest)[row.last_B])
    assert float(scores[1] - scores[0]) == pytest.approx(6.84, abs=0.01)
    after = trunk.state("reward")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"head.{reward.HEAD}.weight"}


def test_a_fitted_head_does_not_depend_on_how_questions_are_packed() -> None:
    trees = [
        PairedTree(tree, ((0, 1),), (0.0,), (0, 1), 1.0, 1.0)
        for tree in random_trees(4, trees=12)
        if len(tree.branches) > 1
    ]
    heads = []
    for rows in ([trees], [[tree] for tree in reversed(trees)]):
        trunk = reward_trunk()
        reward.fit_head(trunk, "reward", map(reward_row, rows))
        heads.append(trunk.state("reward")[f"head.{reward.HEAD}.weight"].clone())
    assert len(trees) > 2
    assert (heads[1] - heads[0]).norm() <= 1e-3 * heads[0].norm()


def test_loss_and_gradient_do_not_depend_on_how_trees_are_packed() -> None:
    trees = [tree for tree in random_trees(4) if tree.branches]
    gradients = []
    for rows in ([trees], [[tree] for tree in trees], [trees[::-1]], [trees[:2], trees[2:]]):
        trunk = Trunk(tiny_model(), precision=torch.float32)
        trunk.add_adapter("sft", ADAPTER, seed=0)
        with trunk.use("sft", training=True) as role:
            for row in rows:
                SftObjective()(role, sft_row(row, everything=False)).losses["loss"].backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in trunk.trainable("sft").values() if p.grad is not None]).clone()
        )
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-6 * gradients[0].norm()
