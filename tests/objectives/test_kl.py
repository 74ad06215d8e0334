from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
import torch

from stackllama.errors import CheckpointError, TrainingError
from stackllama.objectives.kl import ESTIMATORS, AdaptiveController, Controller, FixedController, StoppingController

# Two distributions over four tokens. KL(policy, reference) = sum p log(p / q)
#   = 1/2 log 2 + 1/4 log 1 + 1/8 log 1/2 + 1/8 log 1/2 = (1/2 - 1/8 - 1/8) log 2 = log(2) / 4
POLICY = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
REFERENCE = torch.full((4,), 0.25, dtype=torch.float64)
KL = math.log(2) / 4


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(name: str) -> None:
    # every token, weighted by how often it is sampled
    mean = (POLICY * ESTIMATORS[name](POLICY.log(), REFERENCE.log())).sum().item()
    assert mean == pytest.approx(KL, rel=1e-12)


def test_k2_has_the_bias_it_has() -> None:
    # log-ratios log 2, 0, -log 2, -log 2; half their squares weighted by p: (1/2 + 1/8 + 1/8) log(2)^2 / 2
    mean = (POLICY * ESTIMATORS["k2"](POLICY.log(), REFERENCE.log())).sum().item()
    assert mean == pytest.approx(0.375 * math.log(2) ** 2, rel=1e-12)
    assert mean != pytest.approx(KL, rel=1e-2)


def mean_gradient(name: str) -> torch.Tensor:
    """Of an estimator by the policy's logits, every token weighted by how often it is sampled, without the weights'
    own gradient: what a loss over samples follows.
    """
    logits = POLICY.log().requires_grad_()
    loss = (POLICY * ESTIMATORS[name](torch.log_softmax(logits, 0), REFERENCE.log())).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_as_a_loss_k2_follows_the_kl_k3_the_reverse_one_and_k1_nothing() -> None:
    # d KL(p, q) / d logit_i = p_i (log(p_i / q_i) - KL), with log-ratios log 2, 0, -log 2, -log 2 and KL = log(2) / 4:
    # 1/2 * 3/4, 1/4 * -1/4, 1/8 * -5/4, 1/8 * -5/4 times log 2.
    forward = math.log(2) * torch.tensor([0.375, -0.0625, -0.15625, -0.15625], dtype=torch.float64)
    assert torch.allclose(mean_gradient("k2"), forward, atol=1e-12)
    # d KL(q, p) / d logit_i = p_i - q_i: 1/2 - 1/4, 0, 1/8 - 1/4, 1/8 - 1/4.
    assert torch.allclose(mean_gradient("k3"), torch.tensor([0.25, 0, -0.125, -0.125], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(mean_gradient("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12)


def test_one_token_by_hand() -> None:
    # policy 1/2, reference 1/4: log-ratio log 2 = 0.693147; half its square 0.240227;
    # r = 1/2: 1/2 - 1 - log 1/2 = 0.193147
    logp, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    found = {name: estimate(logp, reference).item() for name, estimate in ESTIMATORS.items()}
    assert found == pytest.approx({"k1": 0.693147, "k2": 0.240227, "k3": 0.193147}, abs=1e-6)


def test_k3_and_k2_are_never_negative_and_all_are_zero_at_equality() -> None:
    logp = -5 * torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for size in (1e-6, 1e-4, 1e-2, 1.0, 5.0):
        reference = logp + size * torch.randn(20_000, generator=torch.Generator().manual_seed(1))
        assert (ESTIMATORS["k3"](logp, reference) >= 0).all()
        assert (ESTIMATORS["k2"](logp, reference) >= 0).all()
    for estimate in ESTIMATORS.values():
        assert not estimate(logp, logp).any()


def test_k3_keeps_its_digits_while_the_models_are_close() -> None:
    # For a small log-ratio x, k3 = x^2 / 2 + x^3 / 6 + ...; at x = 1/1024 exp(x) - 1 - x would be off by percents.
    x = 2.0**-10
    found = ESTIMATORS["k3"](torch.tensor([0.0]), torch.tensor([x])).item()
    assert found == pytest.approx(x * x / 2 + x**3 / 6, rel=1e-4)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.6, 0.2004),  # 6.6 / 6 - 1 = 0.1; times 200 / 10000 = 0.002; 0.2 * 1.002
        (60.0, 0.2008),  # 9, clipped to 0.2; times 0.02 = 0.004; 0.2 * 1.004
        (-3.0, 0.1992),  # -1.5, clipped to -0.2; 0.2 * 0.996
        (6.0, 0.2),
    ],
)
def test_adaptive_update_by_hand(kl: float, expected: float) -> None:
    controller = AdaptiveController(0.2, target=6, horizon=10_000)
    controller.update(kl, 200)
    assert controller.coefficient == pytest.approx(expected, rel=1e-12)


def test_adaptive_controller_refuses_what_would_break_it() -> None:
    controller = AdaptiveController(0.2, target=6, horizon=100)
    with pytest.raises(TrainingError, match="nan"):
        controller.update(math.nan, 8)
    with pytest.raises(ValueError, match="500 episodes"):
        controller.update(-1.0, 500)  # 1 - 0.2 * 500 / 100 = 0
    assert controller.coefficient == 0.2
    with pytest.raises(ValueError, match="target is 0"):
        AdaptiveController(0.2, target=0, horizon=100)


def test_fixed_controller_stays() -> None:
    controller = FixedController(0.05)
    controller.update(100.0, 64)
    assert controller.coefficient == 0.05
    with pytest.raises(ValueError, match="coefficient is -1"):
        FixedController(-1)


def test_a_stopping_controller_keeps_its_price_and_says_where_to_stop() -> None:
    controller = StoppingController(0.0, target=6)
    controller.update(100.0, 64)
    assert (controller.coefficient, controller.stop_at) == (0.0, 6)
    assert FixedController(0.1).stop_at is AdaptiveController(0.2, target=6, horizon=100).stop_at is None
    with pytest.raises(ValueError, match="target is 0"):
        StoppingController(0.1, target=0)


def test_a_resumed_controller_goes_on_exactly() -> None:
    first = AdaptiveController(0.2, target=6, horizon=10_000)
    for kl in (3.3, 7.1, 9.0):
        first.update(kl, 64)
    second = AdaptiveController(0.2, target=6, horizon=10_000)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for controller in (first, second):
        controller.update(1.7, 64)
    assert first.coefficient == second.coefficient != 0.2


@pytest.mark.parametrize(
    "controller",
    [AdaptiveController(0.2, target=6, horizon=100), FixedController(0.2), StoppingController(0.2, target=6)],
)
def test_each_key_of_a_state_is_missed(controller: Controller) -> None:
    state = controller.state_dict()
    controller.load_state_dict(state)
    for key in state:
        rest: Mapping[str, float] = {name: value for name, value in state.items() if name != key}
        with pytest.raises(CheckpointError, match=key):
            controller.load_state_dict(rest)
    with pytest.raises(CheckpointError, match="extra"):
        controller.load_state_dict(state | {"extra": 1.0})


def test_a_state_of_other_settings_is_refused() -> None:
    state = AdaptiveController(0.2, target=6, horizon=100).state_dict()
    with pytest.raises(CheckpointError, match=r"target 6, now it is 3"):
        AdaptiveController(0.2, target=3, horizon=100).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"coefficient 0\.1, now it is 0\.2"):
        FixedController(0.2).load_state_dict({"coefficient": 0.1})
    with pytest.raises(CheckpointError, match=r"target 6, now it is 5"):
        StoppingController(0.2, target=5).load_state_dict(StoppingController(0.2, target=6).state_dict())
