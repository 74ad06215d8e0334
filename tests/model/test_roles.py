"""Roles over one trunk: the same numbers as separate models, and loud when a rule is broken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackllama.errors import ModelError
from stackllama.model.roles import REFERENCE, LoRA, Trunk
from stackllama.tokens.forest import branch_targets, plant
from tests.model.tiny import random_trees, tiny_model

ADAPTER = LoRA(rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))


def noisy_trunk(*roles: str, checkpointing: bool = False) -> Trunk:
    """A trunk whose adapters have B away from 0, each by its own seed."""
    model = tiny_model()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trunk = Trunk(model, precision=torch.float32)
    for seed, role in enumerate(roles):
        trunk.add_adapter(role, ADAPTER, seed=seed)
        draw = torch.Generator().manual_seed(100 + seed)
        for parameter in trunk.trainable(role).values():
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    return trunk


def loss_and_gradients(trunk: Trunk, role: str) -> tuple[Tensor, dict[str, Tensor]]:
    forest = plant(random_trees(5))
    with trunk.use(role, training=True) as entered:
        loss = -entered.logprobs(entered.hidden(forest), branch_targets(forest)).sum()
        loss.backward()
    own = trunk.trainable(role)
    assert all(parameter.grad is not None for parameter in own.values())
    gradients = {name: parameter.grad.clone() for name, parameter in own.items() if parameter.grad is not None}
    trunk.model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_roles_on_one_trunk_equal_two_separate_models(checkpointing: bool) -> None:
    together = noisy_trunk("policy", "reward", checkpointing=checkpointing)
    for role in ("policy", "reward", "policy"):
        alone = noisy_trunk("policy", "reward")
        alone.drop("reward" if role == "policy" else "policy")
        ours, ours_grad = loss_and_gradients(together, role)
        theirs, theirs_grad = loss_and_gradients(alone, role)
        assert torch.equal(ours, theirs)
        assert ours_grad.keys() == theirs_grad.keys()
        for name, gradient in ours_grad.items():
            assert (gradient - theirs_grad[name]).norm() <= 1e-6 * theirs_grad[name].norm(), name


def test_a_fresh_adapter_and_a_copy_start_as_the_reference_to_the_bit() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    trunk.add_adapter("policy", ADAPTER, seed=0)
    trunk.add_copy("full")
    forest = plant(random_trees(6))
    hidden = []
    for role in (REFERENCE, "policy", "full"):
        with trunk.use(role) as entered:
            hidden.append(entered.hidden(forest))
    assert torch.equal(hidden[0], hidden[1])
    assert torch.equal(hidden[0], hidden[2])


def test_only_the_entered_role_has_gradients_on() -> None:
    trunk = noisy_trunk("policy", "reward")
    with trunk.use("policy", training=True):
        switched_on = {name for name, parameter in trunk.model.named_parameters() if parameter.requires_grad}
    assert switched_on
    assert all(".policy." in name for name in switched_on)
    with trunk.use(REFERENCE):
        assert not any(parameter.requires_grad for parameter in trunk.model.parameters())


def test_a_backward_outside_its_role_raises() -> None:
    trunk = noisy_trunk("policy", "reward")
    forest = plant(random_trees(7))
    with trunk.use("policy", training=True) as policy:
        loss = policy.logprobs(policy.hidden(forest), branch_targets(forest)).sum()
    with trunk.use("reward"), pytest.raises(RuntimeError, match="backward of role policy ran while reward"):
        loss.backward()


def test_entering_a_second_role_raises() -> None:
    trunk = noisy_trunk("policy", "reward")
    with (
        trunk.use("policy"),
        pytest.raises(RuntimeError, match="reward was entered while policy is in use"),
        trunk.use("reward"),
    ):
        pass
    with trunk.use("reward"):
        pass


def test_an_unknown_role_raises_with_those_that_exist() -> None:
    with (
        pytest.raises(RuntimeError, match="no role judge on this trunk; it has policy"),
        noisy_trunk("policy").use("judge"),
    ):
        pass


def test_merged_equals_live_in_fp32() -> None:
    trunk = noisy_trunk("sft")
    forest = plant(random_trees(8))
    with trunk.use("sft") as live:
        expected = live.hidden(forest)
    trunk.merge("sft")
    with trunk.use(REFERENCE) as merged:
        found = merged.hidden(forest)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert not [name for name, _ in trunk.model.named_parameters() if "lora" in name]


def test_a_frozen_adapter_stays_live_under_every_role() -> None:
    trunk = noisy_trunk("sft", "policy")
    forest = plant(random_trees(9))
    with trunk.use("sft") as live:
        expected = live.hidden(forest)
    trunk.freeze_under("sft")
    with trunk.use(REFERENCE) as reference:
        assert torch.equal(reference.hidden(forest), expected)
    with trunk.use("policy", training=True):
        assert not any(p.requires_grad for n, p in trunk.model.named_parameters() if ".sft." in n)


def test_saved_state_of_another_shape_is_refused() -> None:
    trunk = noisy_trunk("policy")
    state = trunk.state("policy")
    name = next(iter(state))
    with pytest.raises(ModelError, match="does not fit the model"):
        trunk.load_state("policy", {key: value for key, value in state.items() if key != name})


def test_targets_that_do_not_exist_are_named() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    with pytest.raises(ModelError, match="no linear layer of LlamaForCausalLM is named like c_attn"):
        trunk.add_adapter("policy", LoRA(4, 8.0, 0.0, ("c_attn",)), seed=0)


def test_a_copy_takes_no_adapter_with_it_but_a_frozen_one() -> None:
    trunk = noisy_trunk("reward", "sft")
    forest = plant(random_trees(10))
    trunk.add_copy("full")
    with trunk.use(REFERENCE) as reference, torch.no_grad():
        plain = reference.hidden(forest)
    with trunk.use("full") as full:
        assert torch.equal(full.hidden(forest), plain)
    assert not [name for name in trunk.trainable("full") if "lora" in name]
    trunk.freeze_under("sft")
    trunk.add_copy("later")
    with trunk.use(REFERENCE) as reference:
        live = reference.hidden(forest)
    with trunk.use("later") as later:
        assert (later.hidden(forest) - live).norm() <= 1e-5 * live.norm()
