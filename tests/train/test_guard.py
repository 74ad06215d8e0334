"""The guard on simulated numbers: what is usual, what is refused, and when it is time to go back."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from stackllama.train.guard import Guard, Judgement
from tests.train.toy import SHORT, USUAL

STEPS = 1000
ROUND = 8
"""Steps that share a round's KL."""


def clean_steps(seed: int, *, drift: float, scatter: float) -> Iterator[dict[str, Any]]:
    """Steps of a PPO run in which nothing goes wrong.

    The gradient norm is log-normal, with a drift by the factor ``drift`` over all steps and a standard deviation of
    ``scatter``; the loss has Laplace tails around a small value and now and then a value loss beside it.
    """
    draw = random.Random(seed)
    kl = 0.0
    for step in range(1, STEPS + 1):
        if step % ROUND == 1:
            kl = 4.0 * (1 - math.exp(-step / 200)) + draw.gauss(0, 0.8)
        first = step % ROUND == 1
        yield {
            "loss": 0.06 + 0.11 * draw.choice((-1, 1)) * draw.expovariate(1.0) + 0.05 * draw.expovariate(1.0),
            "gradient_norm": 0.3 * drift ** (step / STEPS) * math.exp(draw.gauss(0, scatter)),
            "metrics": {
                "ratio_mean": 1.0 if first else math.exp(draw.gauss(0, 0.01)),
                "approximate_kl": 0.0 if first else 0.004 * math.exp(draw.gauss(0, 1.2)),
            },
            "notes": {"kl": kl, "reward": draw.gauss(0, 5)},
        }


def judged(guard: Guard, step: int, numbers: dict[str, Any]) -> Judgement:
    bound = guard.clip_bound(1e9)
    return guard.judge(step, **numbers, clipped_at=bound if bound < 1e9 else None)


def after(steps: int, guard: Guard, seed: int = 0, scatter: float = 0.4) -> int:
    """Let a guard see clean steps; gives the number of the next."""
    for step, numbers in enumerate(clean_steps(seed, drift=1.0, scatter=scatter), 1):
        if step > steps:
            return step
        assert judged(guard, step, numbers).action is None
    raise AssertionError


def usual(**changes: float) -> dict[str, Any]:
    """A step right in the middle, but for the changes."""
    numbers: dict[str, Any] = {"loss": 0.06, "gradient_norm": 0.3, "metrics": {}, "notes": {"kl": 1.0}}
    for name, value in changes.items():
        place = {"kl": numbers["notes"], "approximate_kl": numbers["metrics"], "ratio_mean": numbers["metrics"]}
        place.get(name, numbers)[name] = value
    return numbers


@pytest.mark.parametrize("drift", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("scatter", [0.05, 0.3, 0.5])
def test_no_false_alarm_in_a_thousand_clean_steps(drift: float, scatter: float) -> None:
    for seed in range(5):
        guard = Guard({"ratio_mean": 10.0}, USUAL)
        for step, numbers in enumerate(clean_steps(seed, drift=drift, scatter=scatter), 1):
            found = judged(guard, step, numbers)
            assert found.action is None, (seed, step, found)
            assert not guard.lost
        assert guard.clip_bound(1e9) < 1e9  # it was awake


@pytest.mark.parametrize("scatter", [0.05, 0.3, 0.5])
def test_a_loss_times_100_is_caught_in_the_step_that_shows_it(scatter: float) -> None:
    caught = []
    for seed in range(20):
        guard = Guard(None, USUAL)
        at = after(USUAL.warmup + 3 * seed, guard, seed, scatter)
        numbers = next(one for step, one in enumerate(clean_steps(seed, drift=1.0, scatter=scatter), 1) if step == at)
        # What multiplies the loss multiplies its gradient, too.
        scaled = {**numbers, "loss": 100 * numbers["loss"], "gradient_norm": 100 * numbers["gradient_norm"]}
        caught.append(judged(guard, at, scaled).action == "skipped")
    assert all(caught)


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"gradient_norm": 30.0}, "gradient_norm"),
        ({"loss": 6.0}, "loss"),
        ({"ratio_mean": 3.0}, "ratio_mean"),
        ({"ratio_mean": 0.2}, "ratio_mean"),
        ({"approximate_kl": 2.0}, "approximate_kl"),
        ({"kl": 60.0}, "kl"),
    ],
)
def test_each_number_alone_is_caught_and_named(changes: dict[str, float], metric: str) -> None:
    guard = Guard(None, USUAL)
    step = after(200, guard)
    found = judged(guard, step, usual(**changes))
    assert (found.action, found.metric, found.value) == ("skipped", metric, changes[metric])
    assert found.refusal is not None
    assert found.refusal.startswith(f"{metric} {changes[metric]:.3g} is far from the usual ")
    assert found.limit is not None
    assert found.usual is not None
    assert found.usual < found.limit


def test_while_it_warms_up_only_the_impossible_is_refused() -> None:
    guard = Guard({"ratio_mean": 10.0}, USUAL)
    step = after(USUAL.warmup - 1, guard)
    assert judged(guard, step, usual(loss=math.nan)).refusal == "loss is nan"
    assert judged(guard, step, usual(gradient_norm=math.inf)).refusal == "gradient_norm is inf"
    assert judged(guard, step, usual(kl=math.nan)).refusal == "kl is nan"
    assert judged(guard, step, usual(ratio_mean=10.1)).refusal == "ratio_mean 10.1 is over 10"
    assert judged(guard, step, usual(loss=600.0, gradient_norm=300.0)).action is None


def test_a_lower_number_than_usual_is_no_fault() -> None:
    guard = Guard(None, USUAL)
    step = after(200, guard)
    assert judged(guard, step, usual(loss=-60.0, gradient_norm=1e-4, approximate_kl=0.0, kl=-5.0)).action is None


def test_the_bound_of_the_gradient_follows_its_window_and_stays_below_the_recipes() -> None:
    guard = Guard(None, SHORT)
    assert guard.clip_bound(1.0) == 1.0
    for step in range(1, 61):
        guard.judge(step, loss=1.0, gradient_norm=0.1, metrics={}, notes={})
    # No scatter: the least deviation of 0.19 on the log scale, 8 times: 0.1 * exp(1.52) = 0.457.
    assert guard.clip_bound(1.0) == pytest.approx(0.457, abs=1e-3)
    assert guard.clip_bound(0.2) == 0.2
    found = guard.judge(61, loss=1.0, gradient_norm=0.6, metrics={}, notes={}, clipped_at=guard.clip_bound(1.0))
    assert (found.refusal, found.action, found.metric, found.value) == (None, "clipped", "gradient_norm", 0.6)
    # Refused from 0.1 * exp(12 * 0.19) = 0.978 on.
    assert guard.judge(62, loss=1.0, gradient_norm=0.97, metrics={}, notes={}).refusal is None
    assert guard.judge(63, loss=1.0, gradient_norm=0.99, metrics={}, notes={}).refusal is not None


def test_a_steeper_place_is_learned_and_never_leads_back() -> None:
    guard = Guard(None, SHORT)
    actions = []
    for step in range(1, 161):
        bound = guard.clip_bound(1e9)
        found = guard.judge(
            step,
            loss=1.0,
            gradient_norm=0.1 if step <= 80 else 10.0,
            metrics={},
            notes={},
            clipped_at=bound if bound < 1e9 else None,
        )
        actions.append(found.action)
        assert not guard.lost
    assert actions[:80] == [None] * 80
    assert actions[80:82] == ["skipped", "skipped"]
    assert set(actions[82:100]) == {"clipped"}
    assert actions[-20:] == [None] * 20


def test_refusals_in_a_row_lead_back_and_single_ones_do_not() -> None:
    guard = Guard(None, SHORT)
    step = after(100, guard)
    for _ in range(10):  # every second batch is poisoned: the weights are not
        assert judged(guard, step, usual(loss=50.0)).action == "skipped"
        assert judged(guard, step + 1, usual()).action is None
        step += 2
        assert not guard.lost
        assert not guard.doubts
    for _ in range(SHORT.rewind_after):
        assert not guard.lost
        judged(guard, step, usual(loss=math.nan))
        step += 1
    assert guard.lost
    assert guard.good_before == step - SHORT.rewind_after - 1


def test_a_loss_that_stays_high_leads_back_though_each_step_was_accepted() -> None:
    guard = Guard(None, SHORT)
    for step in range(1, 61):
        guard.judge(step, loss=1.0, gradient_norm=0.1, metrics={}, notes={})
    for step in range(61, 69):  # 1 + 8 / 12 is high, 2 would be refused
        assert not guard.lost
        assert guard.judge(step, loss=1.8, gradient_norm=0.1, metrics={}, notes={}).refusal is None
    assert guard.lost
    assert guard.good_before == 60


def test_a_number_of_a_whole_round_counts_once() -> None:
    guard = Guard(None, SHORT)
    for step in range(1, 201):
        guard.judge(step, loss=1.0, gradient_norm=0.1, metrics={}, notes={"kl": 1.0 + 0.1 * (step // ROUND % 2)})
    for step in range(201, 301):  # high, and the same in each step
        assert guard.judge(step, loss=1.0, gradient_norm=0.1, metrics={}, notes={"kl": 8.0}).refusal is None
        assert not guard.lost


def test_what_it_went_back_to_is_not_trusted_where_the_next_step_is_not_usual_either() -> None:
    guard = Guard(None, SHORT)
    step = after(100, guard)
    good = json.loads(json.dumps(guard.state_dict()))
    for _ in range(SHORT.rewind_after):
        judged(guard, step, usual(loss=50.0))
        step += 1
    guard.rewound(step - 1, 90, good)
    assert (guard.lost, guard.rewinds_left) == (False, SHORT.rewinds - 1)
    for _ in range(SHORT.rewind_after):
        judged(guard, step, usual(loss=50.0))
        step += 1
    assert guard.lost
    assert guard.good_before == 90  # so the checkpoint of step 90 is none of them


def test_a_guard_goes_on_from_its_state_as_if_nothing_had_happened() -> None:
    whole, numbers = Guard(None, SHORT), list(clean_steps(3, drift=1.0, scatter=0.5))
    numbers[120] = usual(loss=50.0)
    numbers[140:147] = [usual(gradient_norm=90.0)] * 7
    numbers[150:157] = [usual(loss=2.5, approximate_kl=0.4)] * 7
    found = []
    for step, one in enumerate(numbers[:300], 1):
        saved = json.loads(json.dumps(whole.state_dict()))  # as a checkpoint keeps it
        whole = Guard(None, SHORT)
        whole.load_state_dict(saved)
        found.append((judged(whole, step, one), whole.clip_bound(1.0), whole.lost))
    unbroken = Guard(None, SHORT)
    assert found == [
        (judged(unbroken, step, one), unbroken.clip_bound(1.0), unbroken.lost)
        for step, one in enumerate(numbers[:300], 1)
    ]
    assert {judgement.action for judgement, _, _ in found} >= {None, "skipped"}


@pytest.mark.parametrize("key", ["windows", "strikes", "since", "norm_run", "rewinds", "rewound"])
def test_a_state_that_lacks_a_key_is_missed(key: str) -> None:
    state = Guard(None, SHORT).state_dict()
    del state[key]
    with pytest.raises(KeyError, match=key):
        Guard(None, SHORT).load_state_dict(state)


def test_without_sensitivity_nothing_is_compared() -> None:
    guard = Guard({"ratio_mean": 10.0})
    for step in range(1, 200):
        assert guard.judge(step, loss=1.0, gradient_norm=0.1, metrics={}, notes={}).action is None
    assert guard.judge(200, loss=1e6, gradient_norm=1e6, metrics={}, notes={}).action is None
    assert guard.clip_bound(1.0) == 1.0
    for step in range(201, 260):
        assert guard.judge(step, loss=math.nan, gradient_norm=1.0, metrics={}, notes={}).refusal == "loss is nan"
    assert not guard.lost
    assert not guard.doubts


def test_with_another_phase_what_was_usual_is_forgotten() -> None:
    guard = Guard(None, SHORT)
    step = after(100, guard)
    assert guard.clip_bound(1e9) < 1e9
    guard.enter(0)
    assert guard.clip_bound(1e9) < 1e9
    state = json.loads(json.dumps(guard.state_dict()))
    guard.enter(1)
    assert guard.clip_bound(1e9) == 1e9
    assert judged(guard, step, usual(gradient_norm=300.0, loss=50.0)).action is None
    resumed = Guard(None, SHORT)
    resumed.load_state_dict(state)
    assert resumed.clip_bound(1e9) < 1e9
    resumed.enter(1)  # the state is of phase 0
    assert resumed.clip_bound(1e9) == 1e9
