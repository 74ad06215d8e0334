"""4-bit weights are the numbers that they stand for, in every decoder, with every gradient, one at a time."""

from __future__ import annotations

import importlib.util
import weakref

import pytest
import torch
from torch import Tensor, nn

from stackllama.errors import ModelError
from stackllama.model import memory
from stackllama.model.nf4 import NF4Linear, check_installed, is_quantized, quantize
from stackllama.model.probe import probe
from stackllama.model.roles import REFERENCE, LoRA, Trunk
from stackllama.tokens.forest import Forest, branch_targets, plant
from tests.model.tiny import CONFIGS, random_trees, tiny_model

CPU = torch.device("cpu")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""Dettmers et al. 2023, appendix E."""


def drawn_layer(ins: int, outs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(ins, outs, bias=bias)
        nn.init.normal_(layer.weight, std=0.02)
    return layer.to(dtype)


def dense_twin(kind: str, quantized: nn.Module, dtype: torch.dtype = torch.float32) -> Trunk:
    """A trunk with the numbers that the 4-bit weights stand for, as dense weights."""
    model = tiny_model(kind).to(dtype)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, NF4Linear):
                model.get_parameter(f"{name}.weight").copy_(module.dense(dtype))
    return Trunk(model, precision=dtype)


def with_adapters(trunk: Trunk, dropout: float = 0.0) -> Trunk:
    """A policy over an SFT adapter that stays live, both away from 0."""
    for at, role in enumerate(("sft", "policy")):
        trunk.add_adapter(role, LoRA(4, 8.0, dropout, EVERY), seed=at)
        for number, parameter in enumerate(trunk.trainable(role).values()):
            draw = torch.Generator().manual_seed(100 * at + number)
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    trunk.freeze_under("sft")
    return trunk


def trained(trunk: Trunk, forest: Forest) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    with trunk.use("policy", training=True) as role:
        logprob_N = role.logprobs(role.hidden(forest), branch_targets(forest))
        logprob_N.sum().backward()
    return logprob_N.detach(), {n: p.grad for n, p in trunk.trainable("policy").items() if p.grad is not None}


def test_numbers_on_the_levels_come_back_as_they_are() -> None:
    # One block of 64 numbers, each level four times, times 2: the scale is 2, and it is its own mean.
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.data = 2 * torch.tensor(LEVELS * 4).view(8, 8)
    assert torch.equal(NF4Linear(layer, CPU).dense(torch.float32), layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_numbers_come_back_within_a_tenth(dtype: torch.dtype) -> None:
    layer = drawn_layer(512, 256, dtype=dtype)
    dense = NF4Linear(layer, CPU).dense(dtype)
    assert dense.dtype == dtype
    assert 0.05 < (dense - layer.weight).norm() / layer.weight.norm() < 0.1


def test_bytes_of_a_number_are_those_that_the_plan_counts() -> None:
    packed = NF4Linear(drawn_layer(512, 256), CPU)
    kept = [packed.weight, packed.scales, packed.scales_scales]
    assert all(isinstance(one, Tensor) for one in kept)
    assert sum(one.nbytes for one in kept if isinstance(one, Tensor)) == memory.NF4 * 512 * 256


def test_what_is_unpacked_and_packed_again_has_other_bits() -> None:
    """Why sft/final holds the original weights; of those, packing is the same every time."""
    layer = drawn_layer(512, 256, dtype=torch.bfloat16)
    once, twice, again = NF4Linear(layer, CPU), NF4Linear(layer, CPU), drawn_layer(512, 256, dtype=torch.bfloat16)
    again.weight.data = once.dense(torch.bfloat16)
    first, second, third = (one.dense(torch.bfloat16) for one in (once, twice, NF4Linear(again, CPU)))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_values_and_gradients_are_those_of_the_dense_numbers(kind: str, dropout: float) -> None:
    """By our way through Llamas and by transformers' own through the others; with dropout, by peft's layers."""
    forest = plant(random_trees(3))
    model = tiny_model(kind)
    quantize(model, CPU)
    theirs, their_gradients = trained(with_adapters(dense_twin(kind, model), dropout), forest)
    ours, our_gradients = trained(with_adapters(Trunk(model, precision=torch.float32), dropout), forest)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert our_gradients.keys() == their_gradients.keys()
    assert len(our_gradients) == 2 * len(EVERY) * 2
    for name, gradient in their_gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_in_bf16_values_and_gradients_are_those_of_the_dense_numbers_to_the_bit(kind: str) -> None:
    forest = plant(random_trees(3))
    model = tiny_model(kind).to(torch.bfloat16)
    quantize(model, CPU)
    theirs, their_gradients = trained(with_adapters(dense_twin(kind, model, torch.bfloat16)), forest)
    ours, our_gradients = trained(with_adapters(Trunk(model, precision=torch.bfloat16)), forest)
    assert torch.equal(ours, theirs)
    assert all(torch.equal(our_gradients[name], gradient) for name, gradient in their_gradients.items())


def test_checkpointing_changes_no_bit() -> None:
    forest, found = plant(random_trees(4)), []
    for checkpointing in (False, True):
        model = tiny_model()
        quantize(model, CPU)
        if checkpointing:
            model.activation_checkpointing_enable()
        found.append(trained(with_adapters(Trunk(model, precision=torch.float32)), forest))
    (one, gradients), (two, others) = found
    assert torch.equal(one, two)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_only_the_linear_layers_of_the_decoder_are_packed_and_their_dense_weights_go() -> None:
    model = tiny_model("mistral")  # its output matrix is its own
    before = {name: weakref.ref(one) for name, one in model.named_parameters()}
    quantize(model, CPU)
    packed = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert packed == {
        f"model.layers.{at}.{part}.{name}"
        for at in range(2)
        for part, names in (("self_attn", EVERY[:4]), ("mlp", EVERY[4:]))
        for name in names
    }
    gone = {name for name, one in before.items() if one() is None}
    assert gone == {f"{name}.weight" for name in packed}
    assert is_quantized(model)
    assert not is_quantized(tiny_model())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_one_dense_weight_at_a_time_and_none_between_forward_and_backward(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forest = tiny_model(kind), plant(random_trees(3))
    quantize(model, CPU)
    trunk = with_adapters(Trunk(model, precision=torch.float32))
    made: list[weakref.ref[Tensor]] = []
    own = NF4Linear.dense

    def counted(layer: NF4Linear, dtype: torch.dtype) -> Tensor:
        assert all(one() is None for one in made)
        made.append(weakref.ref(dense := own(layer, dtype)))
        return dense

    monkeypatch.setattr(NF4Linear, "dense", counted)
    with trunk.use("policy", training=True) as role:
        logprob_N = role.logprobs(role.hidden(forest), branch_targets(forest))
        assert len(made) == 2 * len(EVERY)
        assert all(one() is None for one in made)
        logprob_N.sum().backward()
    # And again for the gradient of each layer's input; that of the first queries, keys and values is not wanted.
    assert len(made) == 2 * len(EVERY) + 2 * len(EVERY) - 3
    assert all(one() is None for one in made)


def test_every_decoder_passes_the_probe_in_four_bits() -> None:
    for kind in CONFIGS:
        model = tiny_model(kind)
        quantize(model, CPU)
        probe(model)


def test_adapters_come_and_go_and_leave_the_packed_layers() -> None:
    model, forest = tiny_model(), plant(random_trees(1))
    quantize(model, CPU)
    trunk = Trunk(model, precision=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with trunk.use(REFERENCE) as role:
        bare = role.hidden(forest)
    trunk.add_adapter("policy", LoRA(2, 4.0, 0.0, EVERY), seed=0)
    trunk.drop("policy")
    with trunk.use(REFERENCE) as role:
        assert torch.equal(role.hidden(forest), bare)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trunk.device == CPU


def test_weights_in_four_bits_are_not_trained_in_full() -> None:
    model = tiny_model()
    quantize(model, CPU)
    trunk = Trunk(model, precision=torch.float32)
    for give in (trunk.add_copy, trunk.train_in_place):
        with pytest.raises(ModelError, match="sft is to train all weights, but those of the trunk are in 4 bits"):
            give("sft")


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs? the package bitsandbytes.*stackllama\[qlora\]"):
        quantize(tiny_model(), CPU)
