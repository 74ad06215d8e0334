from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from stackllama.errors import CheckpointError, TrainingError
from stackllama.train.optim import (
    ScheduleKind,
    clip_gradients,
    learning_rate_at,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)

SHAPES = {"lora.A.weight": (5, 33), "lora.B.weight": (17, 3), "norm.weight": (19,), "head.bias": (), "big": (129, 65)}


def parameters(seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def optimizer_over(named: dict[str, Parameter]) -> torch.optim.AdamW:
    return make_optimizer(named, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def train(named: dict[str, Parameter], optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        optimizer.step()


def test_first_step_by_hand() -> None:
    # After bias correction Adam's first step is learning_rate * sign(gradient).
    # The matrix first decays: 2 * (1 - 0.1 * 0.5) = 1.9, then 1.9 - 0.1 = 1.8. The bias does not decay: 2 + 0.1 = 2.1.
    named = {"weight": Parameter(torch.full((1, 1), 2.0)), "bias": Parameter(torch.full((1,), 2.0))}
    optimizer = make_optimizer(named, learning_rate=0.1, weight_decay=0.5)
    named["weight"].grad, named["bias"].grad = torch.full((1, 1), 3.0), torch.full((1,), -7.0)
    optimizer.step()
    assert named["weight"].item() == pytest.approx(1.8, rel=1e-6)
    assert named["bias"].item() == pytest.approx(2.1, rel=1e-6)


def test_the_learning_rate_of_every_group_can_be_set() -> None:
    named = {"weight": Parameter(torch.zeros(1, 1)), "bias": Parameter(torch.zeros(1))}
    optimizer = make_optimizer(named, learning_rate=1.0)
    set_learning_rate(optimizer, 0.25)
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, 5.0)
    optimizer.step()  # learning_rate * sign(gradient)
    assert [parameter.item() for parameter in named.values()] == pytest.approx([-0.25, -0.25])


def test_only_matrices_decay() -> None:
    named = parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = optimizer_over(named)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, parameter in named.items() if not torch.equal(parameter, before[name])}
    assert changed == {"lora.A.weight", "lora.B.weight", "big"}


def test_resumed_is_never_stopped_bit_for_bit() -> None:
    never_stopped = parameters()
    train(never_stopped, optimizer_over(never_stopped), range(7))

    stopped = parameters()
    first = optimizer_over(stopped)
    train(stopped, first, range(3))
    saved = {key: value.clone() for key, value in optimizer_state(first).items()}
    # The new process has its parameters in another order, and its tensors at odd addresses (one float off).
    resumed = {}
    for name, parameter in reversed(stopped.items()):
        shifted = torch.empty(parameter.numel() + 1)[1:].view(parameter.shape)
        resumed[name] = Parameter(shifted.copy_(parameter.detach()))
    second = optimizer_over(resumed)
    load_optimizer_state(second, saved)
    train_in_order = {name: resumed[name] for name in never_stopped}
    train(train_in_order, second, range(3, 7))
    for name, parameter in never_stopped.items():
        assert torch.equal(resumed[name], parameter), name


def test_state_before_the_first_step_has_the_same_keys_and_changes_nothing() -> None:
    fresh, loaded = parameters(), parameters()
    first, second = optimizer_over(fresh), optimizer_over(loaded)
    state = optimizer_state(first)
    load_optimizer_state(second, state)
    for named, optimizer in ((fresh, first), (loaded, second)):
        train(named, optimizer, range(3))
    assert all(torch.equal(fresh[name], loaded[name]) for name in SHAPES)
    assert set(state) == set(optimizer_state(first))
    assert set(state) == {f"{name}.{key}" for name in SHAPES for key in ("step", "exp_avg", "exp_avg_sq")}


def test_loading_copies() -> None:
    named = parameters()
    optimizer = optimizer_over(named)
    train(named, optimizer, range(1))
    saved = {key: value.clone() for key, value in optimizer_state(optimizer).items()}
    kept = {key: value.clone() for key, value in saved.items()}
    load_optimizer_state(optimizer, saved)
    train(named, optimizer, range(1, 2))
    assert all(torch.equal(saved[key], kept[key]) for key in saved)


def test_each_key_of_a_state_is_missed_and_nothing_is_changed() -> None:
    named = parameters()
    optimizer = optimizer_over(named)
    train(named, optimizer, range(2))
    state = {key: value.clone() for key, value in optimizer_state(optimizer).items()}
    other = optimizer_over(parameters())
    for key in state:
        with pytest.raises(CheckpointError, match=key):
            load_optimizer_state(other, {name: value for name, value in state.items() if name != key})
    with pytest.raises(CheckpointError, match=r"unknown lora\.C\.step"):
        load_optimizer_state(other, state | {"lora.C.step": torch.zeros(())})
    with pytest.raises(CheckpointError, match=r"big\.exp_avg is torch\.float32 \(65, 129\)"):
        load_optimizer_state(other, state | {"big.exp_avg": torch.zeros(65, 129)})
    with pytest.raises(CheckpointError, match=r"big\.exp_avg is torch\.bfloat16"):
        load_optimizer_state(other, state | {"big.exp_avg": torch.zeros(129, 65, dtype=torch.bfloat16)})
    assert not any(value.any() for value in optimizer_state(other).values())


def test_refuses_parameters_it_cannot_train_well() -> None:
    with pytest.raises(TrainingError, match="no trainable parameter"):
        make_optimizer({}, learning_rate=1e-3)
    with pytest.raises(TrainingError, match=r"half is trained in torch\.bfloat16"):
        make_optimizer({"half": Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))}, learning_rate=1e-3)
    tied = Parameter(torch.zeros(2, 2))
    with pytest.raises(TrainingError, match="two names"):
        make_optimizer({"embedding": tied, "output": tied}, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 10 steps, warm-up 2, peak 8: up by 8 / 2 a step, then 8 steps from 8 towards 0
        ("constant", [4, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
        ("linear", [4, 8, 8, 7, 6, 5, 4, 3, 2, 1]),
        # 4 * (1 + cos(k * 22.5 degrees)): the halves at 90 degrees, symmetric around it
        ("cosine", [4, 8, 8, 7.6955, 6.8284, 5.5307, 4, 2.4693, 1.1716, 0.3045]),
    ],
)
def test_schedule_by_hand(kind: ScheduleKind, expected: list[float]) -> None:
    rates = [learning_rate_at(step, total_steps=10, warmup_steps=2, kind=kind, peak=8) for step in range(10)]
    assert rates == pytest.approx(expected, abs=1e-4)


def test_schedule_at_its_borders() -> None:
    assert learning_rate_at(0, total_steps=1, warmup_steps=0, kind="cosine", peak=3) == 3
    assert learning_rate_at(4, total_steps=5, warmup_steps=5, kind="linear", peak=3) == 3  # all of it warm-up
    with pytest.raises(ValueError, match=r"step is 5, allowed are 0\.\.4"):
        learning_rate_at(5, total_steps=5, warmup_steps=0, kind="linear", peak=3)
    with pytest.raises(ValueError, match=r"warmup_steps is 6, allowed are 0\.\.5"):
        learning_rate_at(0, total_steps=5, warmup_steps=6, kind="linear", peak=3)
    with pytest.raises(ValueError, match="'step', allowed are constant, linear, cosine"):
        learning_rate_at(0, total_steps=5, warmup_steps=0, kind="step", peak=3)  # type: ignore[arg-type]


def test_clipping_by_hand() -> None:
    # The norm of 3, 4 and 12 together is 13; clipped to 6.5 each is halved. A smaller gradient stays as it is.
    a, b, without = Parameter(torch.zeros(2)), Parameter(torch.zeros(1, 1)), Parameter(torch.zeros(3))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])
    assert clip_gradients(iter([a, b, without]), 6.5).item() == pytest.approx(13)
    assert a.grad.tolist() == pytest.approx([1.5, 2.0], rel=1e-5)
    assert b.grad.item() == pytest.approx(6, rel=1e-5)
    assert clip_gradients([a, b], 100).item() == pytest.approx(6.5, rel=1e-5)
    assert b.grad.item() == pytest.approx(6, rel=1e-5)
    assert without.grad is None


def test_clipping_shows_a_gradient_that_is_not_finite() -> None:
    a = Parameter(torch.zeros(2))
    a.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(clip_gradients([a], 1.0).item())
