"""Our way through a Llama is transformers' own way, in values and gradients, whatever is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackllama.model import llama
from stackllama.model.blocks import plan_blocks
from stackllama.model.roles import REFERENCE, LoRA, Trunk
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
def test_checkpointing_works_twice_and_changes_no_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forest = plant(random_trees(4))
    once, again = trunk_for("llama", method, 0.0), trunk_for("llama", method, 0.0)
    again._copies.get("policy", again.model).activation_checkpointing_enable()
    calls: list[object] = []
    own = llama._layer
    monkeypatch.setattr(llama, "_layer", lambda *given: (calls.append(given[0]), own(*given))[1])  # type: ignore[func-returns-value]
    one, gradients = trained(once, forest)
    assert len(calls) == 2
    two, others = trained(again, forest)
    assert len(calls) == 2 + 4
    assert torch.equal(one, two)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_adapter_of_zeros_over_a_live_one_changes_no_bit(precision: torch.dtype) -> None:
    """PPO's first step has a ratio of 1 and a KL of 0 with an SFT adapter that was not merged, too."""
    forest = plant(random_trees(6))
    trunk = Trunk(tiny_model(), precision=precision)
    for role in ("sft", "policy"):
        trunk.add_adapter(role, LoRA(8, 16.0, 0.0, EVERY), seed=0)
    for number, parameter in enumerate(trunk.trainable("sft").values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    trunk.freeze_under("sft")
    found = []
    for role in ("policy", REFERENCE):
        with trunk.use(role) as entered:
            found.append(entered.logprobs(entered.hidden(forest), branch_targets(forest)))
    assert torch.equal(*found)


def test_a_window_that_llama_does_not_have_is_not_seen() -> None:
    forest = plant(random_trees(2))
    plain, odd = (Trunk(tiny_model(), precision=torch.float32) for _ in range(2))
    odd.model.config.sliding_window = 3
    with plain.use(REFERENCE) as one, odd.use(REFERENCE) as two:
        assert torch.equal(one.hidden(forest), two.hidden(forest))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_rows_of_one_step_share_what_was_cast(method: str, precision: torch.dtype) -> None:
    """Each row has a backward of its own; their gradients add up."""
    forests = [plant(random_trees(seed)) for seed in (1, 2)]
    sums = []
    for taken in (forests, forests[:1], forests[1:]):
        trunk = trunk_for("llama", method, 0.0)
        trunk.precision = precision
        with trunk.use("policy", training=True) as role:
            for forest in taken:
                role.logprobs(role.hidden(forest), branch_targets(forest)).sum().backward()
        gradients = [parameter.grad for parameter in trunk.trainable("policy").values()]
        sums.append([gradient for gradient in gradients if gradient is not None])
    tolerance = 1e-5 if precision == torch.float32 else 1e-2
    assert sums[0]
    for both, one, two in zip(*sums, strict=True):
        assert (both - one - two).norm() <= tolerance * both.norm() + 1e-6


def test_weights_are_cast_once_while_a_role_is_entered() -> None:
    trunk = trunk_for("llama", "lora", 0.0)
    forest = plant(random_trees(2))
    with trunk.use("policy") as role:
        role.hidden(forest)
        before = dict(trunk.cast)
        role.hidden(forest)
        assert len(before) == 2 * len(EVERY)
        assert all(trunk.cast[key] is layer for key, layer in before.items())
    assert not trunk.cast


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
        llama.hidden_states(model, *row, llama.Pass(torch.float32, plan_blocks(forest), None, {}))
