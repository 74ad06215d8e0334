"""Objectives on worked numbers: PPO's two terms, the pairwise loss, the counts that make packing invisible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from stackllama.model.roles import LoRA, Role, Trunk
from stackllama.objectives import reward
from stackllama.objectives.ppo import HEAD, PPOObjective, PPORow, ValueLoss, policy_loss, value_loss
from stackllama.objectives.sft import SftObjective
from stackllama.tokens.forest import Tree, branch_targets, plant
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


def policy_row(trunk: Trunk, *, values: bool) -> PPORow:
    """Two responses of 3 and 2 tokens, as a policy was a little before that stands as the trunk does now."""
    forest = plant([Tree((5, 6), ((7, 8, 2), (9, 2)))])
    targets = branch_targets(forest)
    with trunk.use("policy") as role:
        now_N = role.logprobs(role.hidden(forest), targets)
    return PPORow(
        forest,
        targets,
        old_logprob_N=now_N - torch.tensor([0.1, -0.1, 0.05, 0.0, -0.3]),
        reference_N=now_N + torch.tensor([0.2, -0.4, 0.0, 0.1, 1.0]),
        old_value_N=torch.zeros(5) if values else None,
        advantage_N=torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0]),
        return_N=torch.ones(5) if values else None,
    )


def policy_trunk(*, values: bool) -> Trunk:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    trunk.add_adapter("policy", ADAPTER, seed=0)
    draw = torch.Generator().manual_seed(1)
    for parameter in trunk.trainable("policy").values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    if values:
        trunk.add_head("policy", HEAD, spread=0.2, seed=1)
    return trunk


def test_without_a_value_head_the_policy_loss_stands_alone_and_is_the_same() -> None:
    with_head, without = policy_trunk(values=True), policy_trunk(values=False)
    both = PPOObjective(clip=0.2, value=ValueLoss(clip=0.2, coefficient=0.1))
    alone = PPOObjective(clip=0.2, value=None)
    assert both.terms.keys() - alone.terms.keys() == {"value_loss"}
    assert both.metric_counts.keys() - alone.metric_counts.keys() == {"value_clip_fraction"}
    row, plain = policy_row(with_head, values=True), policy_row(without, values=False)
    with with_head.use("policy") as role:
        expected = both(role, row)
    with without.use("policy") as role:
        found = alone(role, plain)
    assert found.losses.keys() == alone.terms.keys() == {"policy_loss"}
    assert found.metrics.keys() == alone.metric_counts.keys()
    assert torch.equal(found.losses["policy_loss"], expected.losses["policy_loss"])
    assert all(torch.equal(number, expected.metrics[name]) for name, number in found.metrics.items())


def test_while_the_value_warms_up_its_head_alone_has_a_gradient() -> None:
    trunk = policy_trunk(values=True)
    row = policy_row(trunk, values=True)
    objective = PPOObjective(clip=0.2, value=ValueLoss(0.2, 0.1), entropy_bonus=0.5, kl_coefficient=0.3)
    own = trunk.trainable("policy")
    with trunk.use("policy", training=True) as role:
        plain = objective(role, row)
        full = torch.autograd.grad(plain.losses["value_loss"], list(own.values()))
        warming = objective(role, replace(row, value_alone=True))
        total = torch.stack([term.coefficient * warming.losses[name] for name, term in objective.terms.items()]).sum()
        total.backward()
    for (name, parameter), whole in zip(own.items(), full, strict=True):
        if name.startswith("head."):
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, 0.1 * whole, rtol=1e-5)
        else:
            assert parameter.grad is None  # so that AdamW neither moves it nor begins its moments
    assert {name: float(one.detach()) for name, one in warming.losses.items()} == {
        name: float(one.detach()) for name, one in plain.losses.items()
    }


def gradient(trunk: Trunk, loss: Callable[[Role], torch.Tensor]) -> torch.Tensor:
    """Of all that the policy trains, laid end to end."""
    own = list(trunk.trainable("policy").values())
    with trunk.use("policy", training=True) as role:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss(role), own)])


def test_a_tokens_weight_multiplies_its_loss_and_nothing_else() -> None:
    trunk = policy_trunk(values=False)
    row = policy_row(trunk, values=False)
    weighted = replace(row, weight_N=torch.tensor([0.0, 2.0, 1.0, 0.5, 0.0]))
    objective = PPOObjective(clip=0.2, value=None)
    # Log-ratios 0.1, -0.1, 0.05, 0, 0.3 with advantages 1, 1, 1, -2, -2: losses -e^0.1, -e^-0.1, -e^0.05, 2, 2 e^0.3,
    # none of them clipped (e^0.3 = 1.35 of a bad action counts whole). So 2 (-0.90484) - 1.05127 + 0.5 * 2 = -1.86095.
    with trunk.use("policy") as role:
        found, plain = objective(role, weighted), objective(role, row)
    assert float(found.losses["policy_loss"]) == pytest.approx(-1.86095, abs=1e-4)
    assert all(torch.equal(number, plain.metrics[name]) for name, number in found.metrics.items())
    ones = replace(row, weight_N=torch.ones(5))
    with trunk.use("policy") as role:
        assert torch.equal(objective(role, ones).losses["policy_loss"], plain.losses["policy_loss"])

    def by_hand(role: Role) -> torch.Tensor:
        logprob_N = role.logprobs(role.hidden(row.forest), row.targets)
        # The gradient of such a loss is minus the advantage times the ratio, times that of the log-probability.
        slope_N = torch.tensor([0.0, -2 * math.exp(-0.1), -math.exp(0.05), 0.5 * 2.0, 0.0])
        return (slope_N * logprob_N).sum()

    found_gradient = gradient(trunk, lambda role: objective(role, weighted).losses["policy_loss"])
    expected = gradient(trunk, by_hand)
    assert (found_gradient - expected).norm() <= 1e-4 * expected.norm()


def test_an_entropy_bonus_pulls_towards_more_entropy() -> None:
    trunk = policy_trunk(values=False)
    row = policy_row(trunk, values=False)
    rewarded, plain = PPOObjective(clip=0.2, value=None, entropy_bonus=0.5), PPOObjective(clip=0.2, value=None)

    def entropy(role: Role) -> torch.Tensor:
        logprob_NV = _distributions(role, row)
        return -(logprob_NV.exp() * logprob_NV).sum()

    with trunk.use("policy") as role:
        value = float(entropy(role))
        assert float(plain(role, row).metrics["entropy"]) == pytest.approx(value, rel=1e-5)
        assert float(rewarded(role, row).metrics["entropy"]) == pytest.approx(value, rel=1e-5)
    found = gradient(trunk, lambda role: _weighted(rewarded, role, row))
    expected = gradient(trunk, lambda role: _weighted(plain, role, row)) - 0.5 * gradient(trunk, entropy)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert (found - gradient(trunk, lambda role: _weighted(plain, role, row))).norm() > 0.05 * found.norm()


def _distributions(role: Role, row: PPORow) -> torch.Tensor:
    return role.all_logprobs(role.hidden(row.forest)[row.targets.predictor_N])


def _weighted(objective: PPOObjective, role: Role, row: PPORow) -> torch.Tensor:
    """Sums of the terms times their coefficients."""
    found = objective(role, row).losses
    return torch.stack([term.coefficient * found[name] for name, term in objective.terms.items()]).sum()


def test_kl_in_the_loss_worked_by_hand() -> None:
    # log(reference / policy) of the five tokens is 0.2 -0.4 0 0.1 1; r - 1 - log r of each:
    # 1.221403 - 1.2 = 0.021403, 0.670320 - 0.6 = 0.070320, 0, 1.105171 - 1.1 = 0.005171, 2.718282 - 2 = 0.718282.
    trunk = policy_trunk(values=False)
    row = policy_row(trunk, values=False)
    charged, plain = PPOObjective(clip=0.2, value=None, kl_coefficient=0.04), PPOObjective(clip=0.2, value=None)
    with trunk.use("policy", training=True) as role:
        total = charged(role, row)
        assert float(total.metrics["kl_loss"]) == pytest.approx(0.815176, abs=1e-5)
        found = (total.losses["policy_loss"] - plain(role, row).losses["policy_loss"]) / 0.04
        assert float(found.detach()) == pytest.approx(0.815176, abs=1e-4)
        # d/d log p of r - 1 - log r is 1 - r, so the policy is pulled towards tokens that the reference likes more.
        logprob_N = role.logprobs(role.hidden(row.forest), row.targets)
        pull_N = 1.0 - torch.tensor([0.2, -0.4, 0.0, 0.1, 1.0]).exp()
        own = list(trunk.trainable("policy").values())
        one, two = (
            torch.cat([part.flatten() for part in torch.autograd.grad(loss, own)])
            for loss in (found, (pull_N * logprob_N).sum())
        )
    assert (one - two).norm() <= 1e-4 * two.norm()


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
