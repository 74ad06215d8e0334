"""The operators agree with their definitions, in values and in every gradient, and keep less for the backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from stackllama.model.fused import Gated, Given, Layer, Made, Normed, linears, made_input, rotated

N, D = 7, 6
EPS = 1e-5


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def by_definition(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


MAKERS: dict[str, tuple[tuple[Tensor, ...], Made, Callable[..., Tensor]]] = {
    "given": ((drawn(N, D, seed=1),), Given(), lambda x: x),
    "normed": (
        (drawn(N, D, seed=2), drawn(D, seed=3)),
        Normed(EPS, torch.float32),
        by_definition,
    ),
    "gated": ((drawn(N, D, seed=4), drawn(N, D, seed=5)), Gated(), lambda g, u: silu(g) * u),
}


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert (one - two).norm() <= 2e-6 * two.norm()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("adapted", ["all", "second", "none"])
def test_outputs_and_gradients_are_those_of_the_definition(kind: str, adapted: str) -> None:
    sources, made, definition = MAKERS[kind]
    outs, ranks = (5, 4, 3), (2, 3, 1)
    weights = [drawn(out, D, seed=10 + out) for out in outs]
    biases = [drawn(outs[0], seed=20), None, drawn(outs[2], seed=22)]
    on = {"all": (0, 1, 2), "second": (1,), "none": ()}[adapted]
    ups = {at: drawn(outs[at], ranks[at], seed=30 + at) for at in on}
    downs = {at: drawn(ranks[at], D, seed=40 + at) for at in on}
    adapters = [{f"of {at % 2}": (ups[at], downs[at], 0.5 + at)} if at in on else {} for at in range(3)]
    layers = [Layer(*of) for of in zip(weights, biases, adapters, strict=True)]
    outputs = linears(made, sources, layers)
    given = definition(*sources)
    wanted = [linear(given, w, b) for w, b in zip(weights, biases, strict=True)]
    wanted = [
        one + (0.5 + at) * (given @ downs[at].T @ ups[at].T) if at in on else one for at, one in enumerate(wanted)
    ]
    close(outputs, tuple(wanted))
    inputs = [*sources, *weights, *[b for b in biases if b is not None], *ups.values(), *downs.values()]
    upstream = [torch.randn(one.shape, generator=torch.Generator().manual_seed(50)) for one in outputs]
    close(torch.autograd.grad(outputs, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream))


@pytest.mark.parametrize("kind", MAKERS)
def test_the_input_itself_has_the_gradients_of_its_definition(kind: str) -> None:
    sources, made, definition = MAKERS[kind]
    upstream = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    one, two = made_input(made, sources), definition(*sources)
    close((one,), (two,))
    close(torch.autograd.grad(one, sources, upstream), torch.autograd.grad(two, sources, upstream))


def test_frozen_weights_and_sources_get_no_gradient() -> None:
    hidden, weight = drawn(N, D, seed=0).detach(), drawn(D, seed=1).detach()
    up, down = drawn(4, 2, seed=2), drawn(2, D, seed=3)
    (output,) = linears(
        Normed(EPS, torch.float32),
        (hidden, weight),
        [Layer(drawn(4, D, seed=4).detach(), None, {"one": (up, down, 1.0)})],
    )
    output.sum().backward()
    assert hidden.grad is None
    assert weight.grad is None
    assert up.grad is not None
    assert down.grad is not None


def test_what_is_made_is_not_kept() -> None:
    """Of 64 features between gate and down, the product is not kept beside gate and up."""
    gate, up = drawn(100, 64, seed=1), drawn(100, 64, seed=2)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    weight, up_OR, down_RD = drawn(8, 64, seed=3).detach(), drawn(8, 2, seed=4), drawn(2, 64, seed=5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (output,) = linears(Gated(), (gate, up), [Layer(weight, None, {"one": (up_OR, down_RD, 1.0)})])
    assert kept.count((100, 64)) == 2
    assert kept.count((100, 2)) == 1  # behind the adapter's first half
    assert output.shape == (100, 8)


def test_nothing_is_kept_behind_the_backward() -> None:
    """A loss that is still at hand, to be logged, must not hold a row's activations."""
    gate, up = drawn(100, 64, seed=1) * 1, drawn(100, 64, seed=2) * 1
    freed = [weakref.ref(gate), weakref.ref(up)]
    (output,) = linears(Gated(), (gate, up), [Layer(drawn(8, 64, seed=3), None)])
    loss = output.sum()
    del gate, up, output
    loss.backward()
    assert [one() for one in freed] == [None, None]
    assert loss.grad_fn is not None


def test_a_rotation_worked_by_hand() -> None:
    # Half a head apart: (1, 2) and (3, 4) are the pairs (1, 3) and (2, 4). By 90 degrees (1, 3) goes to (-3, 1); by 0
    # (2, 4) stays. Its gradient goes the other way: (1, 0, 0, 0) comes from (0, 0, -1, 0).
    heads = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], requires_grad=True)
    cos, sin = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    turned = rotated(heads, cos, sin)
    assert turned.tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]
    (back,) = torch.autograd.grad(turned, heads, torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))
    assert back.tolist() == [[[0.0, 0.0, -1.0, 0.0]]]
