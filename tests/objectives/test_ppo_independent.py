"""The whole of PPO against an implementation that shares nothing with it: losses, and each parameter's gradient."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives import kl, ppo, reward
from stackllama.objectives.advantages import WITHOUT_VALUES
from stackllama.objectives.scaling import ScoreShaping
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY, ExperienceSource, PPOSettings
from stackllama.tokens.batches import Batch, StepResult
from stackllama.tokens.forest import Tree
from tests.model.tiny import VOCABULARY, tiny_model
from tests.objectives import independent
from tests.objectives.independent import Sample, Terms

EOS = 2
ADAPTER = LoRA(4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj", "down_proj"))
SCALE = 2.0  # 8 / 4
CLOSE = 1e-5
"""Largest difference, as a share of the norm: what fp32 leaves of the float64 that it is compared with."""

VARIANTS = {
    "ppo, a value of its own": Terms(own_value=True, entropy_bonus=0.05),
    "ppo": Terms(),
    "ppo, all terms": Terms(
        entropy_bonus=0.05, charge="loss", estimator="k3", price=0.3, gamma=0.9, lam=0.8, whiten=False
    ),
    "ppo, k3 in the reward": Terms(estimator="k3", value_clip=0.02, value_coefficient=1.0),
    "ppo, k2 in the loss": Terms(charge="loss", estimator="k2"),
    "rloo": Terms(advantage="rloo", whiten=False),
    "best": Terms(advantage="best", whiten=False, price=0.5),
    "grpo": Terms(advantage="grpo", charge="loss", estimator="k3", whiten=False),
    "reinforce": Terms(advantage="reinforce", estimator="k2", entropy_bonus=0.01),
}


def trained_roles(terms: Terms) -> tuple[str, ...]:
    return (POLICY, "value") if terms.own_value else (POLICY,)


def value_role(terms: Terms) -> str:
    return trained_roles(terms)[-1]


def make_trunk(terms: Terms) -> Trunk:
    """A policy, a reward model and perhaps a value that all differ from the trunk."""
    trunk = Trunk(tiny_model(), precision=torch.float32)
    draw = torch.Generator().manual_seed(5)
    roles = (*trained_roles(terms), "reward")
    for seed, role in enumerate(roles):
        trunk.add_adapter(role, ADAPTER, seed=seed)
    if terms.advantage == "gae":
        trunk.add_head(value_role(terms), ppo.HEAD, spread=0.1, seed=2)
    trunk.add_head("reward", reward.HEAD, spread=0.1, seed=1)
    for role in roles:
        move(trunk, role, 0.05, draw)
    return trunk


def move(trunk: Trunk, role: str, size: float, draw: torch.Generator) -> None:
    for parameter in trunk.trainable(role).values():
        parameter.data += size * torch.randn(parameter.shape, generator=draw)


def make_source(trunk: Trunk, terms: Terms) -> ExperienceSource:
    draw = random.Random(0)
    prompts = [Tree(tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(3, 9))), (), at) for at in range(6)]
    settings = PPOSettings(
        rounds=1,
        prompts=6,
        samples=4,
        epochs=1,
        minibatches=3,
        gamma=terms.gamma,
        gae_lambda=terms.lam,
        whiten=terms.whiten,
        missing_eos_penalty=terms.missing_eos_penalty,
        kl_in_reward=terms.charge == "reward",
        kl_stop=None,
        row_tokens=64,
    )
    return ExperienceSource(
        trunk,
        prompts,
        settings=settings,
        sampling=Sampling(seed=1, max_new_tokens=8, eos_id=EOS),
        controller=kl.FixedController(terms.price),
        estimator=kl.ESTIMATORS[terms.estimator],
        shaping=ScoreShaping(scaling=False, clip=None),
        estimate=WITHOUT_VALUES.get(terms.advantage),
        reward_role="reward",
        value_role=value_role(terms),
    )


def samples_of(batch: Batch[ppo.PPORow]) -> list[Sample]:
    """The responses of a minibatch, in the order of its rows."""
    found = []
    for row in batch.rows:
        tokens = row.forest.tokens_T.tolist()
        found += [
            Sample(tuple(tokens[one.root_start : one.root_stop]), tuple(tokens[one.start : one.stop]))
            for one in row.forest.branches
        ]
    return found


def ours(trunk: Trunk, terms: Terms, batch: Batch[ppo.PPORow]) -> tuple[float, dict[str, Tensor]]:
    """The loss of a minibatch, and the gradient of each parameter, as the loop makes them."""
    value = ppo.ValueLoss(terms.value_clip, terms.value_coefficient)
    objectives: list[ppo.PPOObjective | ppo.ValueObjective] = [
        ppo.PPOObjective(
            clip=terms.clip,
            value=value if terms.advantage == "gae" and not terms.own_value else None,
            entropy_bonus=terms.entropy_bonus,
            kl_coefficient=terms.price if terms.charge == "loss" else 0.0,
            kl_estimator=kl.ESTIMATORS[terms.estimator],
        )
    ]
    if terms.own_value:
        objectives.append(ppo.ValueObjective(value))
    own = {f"{role}/{name}": one for role in trained_roles(terms) for name, one in trunk.trainable(role).items()}
    total = 0.0
    for parameter in own.values():
        parameter.grad = None
    for objective in objectives:
        with trunk.use(objective.role, training=True) as role:
            for row in batch.rows:
                found = objective(role, row).losses
                parts = [
                    found[name] * term.coefficient / batch.counts[term.count] for name, term in objective.terms.items()
                ]
                torch.stack(parts).sum().backward()
                total += float(sum(part.detach() for part in parts))
    return total, {name: parameter.grad for name, parameter in own.items() if parameter.grad is not None}


class Other:
    """The same batch by the independent implementation, from the weights that `ours` has."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.model = tiny_model(attention="eager").double().requires_grad_(False)

    def leaves(self, trunk: Trunk, role: str) -> dict[str, Tensor]:
        return {name: tensor.double().clone().requires_grad_() for name, tensor in trunk.state(role).items()}

    def read(self, leaves: Mapping[str, independent.Weights], samples: Sequence[Sample]) -> list[independent.Reading]:
        """What the policy says, with the values of whoever has them."""
        shared = ppo.HEAD if self.terms.advantage == "gae" and not self.terms.own_value else None
        now = independent.read(self.model, leaves[POLICY], samples, scale=SCALE, head=shared)
        if not self.terms.own_value:
            return now
        values = independent.read(self.model, leaves["value"], samples, scale=SCALE, head=ppo.HEAD)
        return [replace(one, head_T=value.head_T) for one, value in zip(now, values, strict=True)]

    @torch.no_grad()
    def experience(self, trunk: Trunk, minibatches: Sequence[Sequence[Sample]]) -> list[list[independent.Old]]:
        samples = [one for each in minibatches for one in each]
        ended = [
            Sample(one.prompt, one.response if one.response[-1] == EOS else (*one.response, EOS)) for one in samples
        ]
        scores = independent.read(self.model, self.leaves(trunk, "reward"), ended, scale=SCALE, head=reward.HEAD)
        found = independent.experience(
            samples,
            self.read({role: self.leaves(trunk, role) for role in trained_roles(self.terms)}, samples),
            independent.read(self.model, None, samples, scale=SCALE, head=None),
            [float(one.head_at_end) for one in scores if one.head_at_end is not None],
            self.terms,
            eos=EOS,
        )
        taken = iter(found)
        return [[next(taken) for _ in each] for each in minibatches]

    def loss(
        self, trunk: Trunk, samples: Sequence[Sample], old: Sequence[independent.Old]
    ) -> tuple[float, Mapping[str, Tensor], list[float]]:
        """The loss, the gradient of each parameter, and the ratio of each token."""
        leaves = {role: self.leaves(trunk, role) for role in trained_roles(self.terms)}
        now = self.read(leaves, samples)
        ratios = torch.cat([(one.logprob_T - o.logprob_T).exp() for one, o in zip(now, old, strict=True)]).tolist()
        loss = independent.loss(now, old, self.terms)
        flat = {f"{role}/{name}": one for role, weights in leaves.items() for name, one in weights.items()}
        gradients = torch.autograd.grad(loss, list(flat.values()))
        return float(loss.detach()), dict(zip(flat, gradients, strict=True)), ratios


@pytest.mark.parametrize("moved", [False, True], ids=["first step", "after steps"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_loss_and_gradients_are_those_of_an_independent_implementation(variant: str, moved: bool) -> None:
    terms = VARIANTS[variant]
    trunk, other = make_trunk(terms), Other(terms)
    source = make_source(trunk, terms)
    minibatches = []
    while (batch := source.next()) is not None:
        minibatches.append(batch)
        source.observe(StepResult(1, 0.0, {}, 0.0, None))
    samples = [samples_of(batch) for batch in minibatches]
    cut = [one.response[-1] != EOS for each in samples for one in each]
    assert len(cut) == 24
    assert 0 < sum(cut) < 24
    old = other.experience(trunk, samples)
    if moved:
        move(trunk, POLICY, 0.02, torch.Generator().manual_seed(9))
    for batch, mine, before in zip(minibatches, samples, old, strict=True):
        loss, gradients = ours(trunk, terms, batch)
        expected, wanted, ratios = other.loss(trunk, mine, before)
        outside = sum(abs(ratio - 1) > terms.clip for ratio in ratios)
        assert 0 < outside < len(ratios) if moved else outside == 0
        assert loss == pytest.approx(expected, rel=CLOSE, abs=CLOSE)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            assert (gradient.double() - wanted[name]).norm() <= CLOSE * wanted[name].norm(), name
