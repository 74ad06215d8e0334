"""Our way through a Llama is transformers' own way, in values and gradients, whatever is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackllama.model import llama
from stackllama.model.blocks import plan_blocks
from stackllama.model.roles import LoRA, Trunk
from stackllama.tokens.forest import Forest, branch_targets, last_tokens, plant
from tests.model.tiny import random_trees, tiny_model

FAMILIES = sorted(llama.FAMILIES)
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def trunk_for(kind: str, method: str, dropout: float) -> Trunk:
    trunk = Trunk(tiny_model(kind), precision=torch.float32)
    if method == "full":
        trunk.add_copy("policy")
        return trunk
    trunk.add_adapter("policy", LoRA(4, 8.0, dropout, EVERY), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(trunk.trainable("policy").values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    if method == "frozen and live":
        trunk.add_adapter("sft", LoRA(2, 4.0, dropout, ("q_proj", "down_proj")), seed=1)
        for parameter in trunk.trainable("sft").values():
            torch.nn.init.constant_(parameter, 0.02)
        trunk.freeze_under("sft")
    return trunk


def trained(trunk: Trunk, forest: Forest) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    with trunk.use("policy", training=True) as role:
        logprob_N = role.logprobs(role.hidden(forest), branch_targets(forest))
        logprob_N.sum().backward()
    return logprob_N.detach(), {n: p.grad for n, p in trunk.trainable("policy").items() if p.grad is not None}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full", "frozen and live"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_values_and_gradients_are_those_of_transformers(
    kind: str, method: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = plant(random_trees(3))
    ours, our_gradients = trained(trunk_for(kind, method, dropout), forest)
    monkeypatch.setattr(llama, "reads", lambda _: False)
    theirs, their_gradients = trained(trunk_for(kind, method, dropout), forest)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointing_changes_no_bit(method: str) -> None:
    forest = plant(random_trees(4))
    once, again = trunk_for("llama", method, 0.0), trunk_for("llama", method, 0.0)
    model = again._copies.get("policy", again.model)
    model.activation_checkpointing_enable()
    (one, gradients), (two, others) = trained(once, forest), trained(again, forest)
    assert torch.equal(one, two)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_states_at_some_places_are_those_of_all(kind: str) -> None:
    forest = plant(random_trees(5))
    places = last_tokens(forest)
    trunk = trunk_for(kind, "lora", 0.0)
    found = []
    for at_places in (False, True):
        with trunk.use("policy", training=True) as role:
            hidden_BD = role.hidden_at(forest, places) if at_places else role.hidden(forest)[places]
            (hidden_BD * torch.arange(hidden_BD.shape[1])).sum().backward()
        gradients = [
            parameter.grad.clone() for parameter in trunk.trainable("policy").values() if parameter.grad is not None
        ]
        trunk.model.zero_grad(set_to_none=True)
        found.append((hidden_BD.detach(), *gradients))
    assert len(found[0]) == len(found[1])
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm() + 1e-7


def test_other_shapes_are_left_to_transformers() -> None:
    for kind in ("qwen3", "gemma2"):
        assert not llama.reads(tiny_model(kind).base_model)


def test_attention_dropout_is_refused_and_not_forgotten() -> None:
    model, forest = tiny_model().base_model.train(), plant(random_trees(1))
    model.layers[1].self_attn.attention_dropout = 0.1
    row = (forest.tokens_T[None], forest.positions_T[None])
    with pytest.raises(ValueError, match="dropout"):
        llama.hidden_states(model, *row, llama.Pass(torch.float32, plan_blocks(forest), None))
