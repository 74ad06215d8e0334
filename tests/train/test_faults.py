"""Faults in a real run: each is caught, a skipped step changes nothing, and the run ends as well as a clean one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackllama.errors import TrainingError
from stackllama.objectives import reward
from stackllama.objectives.ppo import PPOObjective, ValueLoss
from stackllama.rollout.experience import POLICY, ExperienceSource
from stackllama.tokens.batches import SftRow, StepResult
from stackllama.train import checkpoint
from stackllama.train.guard import Guard
from stackllama.train.loop import Loop, Settings
from stackllama.train.metrics import JsonlLog, read_log
from stackllama.train.optim import make_optimizer
from tests.rollout.test_experience import make_source, make_trunk
from tests.train.toy import FAULTS, SHORT, USUAL, held_out, make_toy, state_of

# Every test here starts from the same trainings, which one process makes once.
pytestmark = pytest.mark.xdist_group("faults")

FAULTY = 81
"""The step that goes wrong."""


def events(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(folder / "metrics.jsonl") if "guard" in line]


def actions(folder: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["guard"]) for line in events(folder)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Held-out losses of clean runs that differ in their seed alone."""
    folder = tmp_path_factory.mktemp("clean")
    found = []
    for seed in range(4):
        loop = make_toy(folder / str(seed), seed=seed)
        loop.run()
        assert events(folder / str(seed)) == []
        found.append(held_out(loop))
    return found


def ends_as_well(loss: float, clean: list[float]) -> bool:
    """Whether a run of seed 0 ends within what another seed changes: the clean ones differ by that much."""
    return loss <= clean[0] + (max(clean) - min(clean))


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_step_changes_nothing_and_the_run_ends_as_well(tmp_path: Path, clean: list[float], name: str) -> None:
    states: dict[int, dict[str, Tensor]] = {}

    def keep(result: StepResult) -> None:
        if FAULTY - 1 <= result.step <= FAULTY + 1:
            states[result.step] = state_of(loop)

    loop = make_toy(tmp_path, faults={FAULTY: FAULTS[name]}, callbacks=(keep,))
    loop.run()
    assert actions(tmp_path) == [(FAULTY, "skipped")]
    before, at, behind = (states[step] for step in (FAULTY - 1, FAULTY, FAULTY + 1))
    assert any(key.endswith("exp_avg_sq") for key in before)
    assert all(torch.equal(before[key], at[key]) for key in before)
    assert not all(torch.equal(at[key], behind[key]) for key in before)
    assert ends_as_well(held_out(loop), clean)


def test_poisoned_batches_are_passed_over(tmp_path: Path, clean: list[float]) -> None:
    poisoned = frozenset({90, 110, 111, 130})
    loop = make_toy(tmp_path, poisoned=poisoned)
    loop.run()
    assert actions(tmp_path) == [(step, "skipped") for step in sorted(poisoned)]
    assert {event["guard_metric"] for event in events(tmp_path)} == {"loss"}
    assert ends_as_well(held_out(loop), clean)


def damage(loop: Loop[SftRow], at: int) -> None:
    """What a bad step does that nothing showed: all weights are off."""

    def shake(result: StepResult) -> None:
        if result.step == at:
            draw = torch.Generator().manual_seed(at)
            for weight in loop.trunk.trainable("sft").values():
                weight.data += 0.3 * torch.randn(weight.shape, generator=draw)

    loop.after_step = (*loop.after_step, shake)


def test_damaged_weights_lead_back_to_good_ones_and_the_run_ends_as_well(tmp_path: Path, clean: list[float]) -> None:
    loop = make_toy(tmp_path)
    damage(loop, FAULTY)
    results: list[StepResult] = []
    loop.after_step = (*loop.after_step, results.append)
    loop.run()
    # Four steps show it, 82 to 85. The newest checkpoint is of step 80, before the damage.
    assert actions(tmp_path) == [(82, "skipped"), (83, "skipped"), (84, "skipped"), (85, "rewound")]
    assert events(tmp_path)[-1]["rewound_to"] == 80
    assert [result.step for result in results if result.rewound is not None] == [85]
    assert loop.step == 150
    assert loop.work == loop.source.total_work
    assert ends_as_well(held_out(loop), clean)
    loop = make_toy(tmp_path / "unguarded", sensitivity=None)
    damage(loop, FAULTY)
    loop.run()
    assert not ends_as_well(held_out(loop), clean)


def test_a_checkpoint_that_holds_the_damage_is_not_gone_back_to(tmp_path: Path) -> None:
    loop = make_toy(tmp_path, steps=100)
    damage(loop, 80)  # callbacks run before a checkpoint is written
    loop.run()
    assert actions(tmp_path)[-1] == (84, "rewound")
    assert events(tmp_path)[-1]["rewound_to"] == 70


def test_what_was_gone_back_to_is_the_checkpoint_to_the_bit(tmp_path: Path) -> None:
    loop = make_toy(tmp_path, steps=85)
    damage(loop, FAULTY)
    seen: dict[str, Any] = {}

    def compare(result: StepResult) -> None:
        if result.rewound is not None:
            found = checkpoint.load_latest(tmp_path / "checkpoints", before=result.rewound + 1)
            assert found is not None
            seen.update(saved={**found[1]["weights"], **found[1]["optimizer"]}, here=state_of(loop))

    loop.after_step = (*loop.after_step, compare)
    loop.run()
    assert seen["saved"].keys() == seen["here"].keys()
    assert all(torch.equal(seen["saved"][key], seen["here"][key]) for key in seen["saved"])


class StopHereError(Exception):
    pass


def eventful(folder: Path) -> Loop[SftRow]:
    """A run with three faults: a loss that is NaN, damaged weights, and a loss times 100."""
    loop = make_toy(folder, faults={60: FAULTS["loss NaN"], 100: FAULTS["loss times 100"]}, steps=112)
    damage(loop, FAULTY)
    return loop


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loop[SftRow], Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    loop = eventful(folder)
    loop.run()
    assert actions(folder) == [
        (60, "skipped"),
        *((step, "skipped") for step in (82, 83, 84)),
        (85, "rewound"),
        (100, "skipped"),
    ]
    return loop, folder


@pytest.mark.parametrize("stop_at", [59, 60, 79, 83, 85, 86, 101])
def test_resumed_equals_uninterrupted_through_every_event(
    tmp_path: Path, unbroken: tuple[Loop[SftRow], Path], stop_at: int
) -> None:
    whole, folder = unbroken
    broken = eventful(tmp_path)

    def stop(result: StepResult) -> None:
        if result.step == stop_at:
            raise StopHereError

    broken.after_step = (*broken.after_step, stop)
    with pytest.raises(StopHereError):
        broken.run()
    torch.manual_seed(99)
    resumed = eventful(tmp_path)
    resumed.run()
    expected, found = state_of(whole), state_of(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    # Compared as text: NaN is not equal to itself.
    assert (tmp_path / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    assert resumed.guard.state_dict() == whole.guard.state_dict()


def test_going_back_in_vain_ends_with_advice(tmp_path: Path) -> None:
    loop = make_toy(tmp_path, poisoned=frozenset(range(83, 200)), sensitivity=replace(SHORT, rewinds=1))
    with pytest.raises(TrainingError, match=r"loss .* far from the usual .* as often as allowed; lower the learning"):
        loop.run()
    assert loop.step == 90  # back from step 86 to 80, and four refusals later it would be 70
    assert [action for _, action in actions(tmp_path)].count("rewound") == 1


def test_where_it_may_not_go_back_refusals_alone_end_the_run(tmp_path: Path) -> None:
    loop = make_toy(tmp_path, poisoned=frozenset(range(81, 200)), sensitivity=replace(SHORT, rewinds=0))
    with pytest.raises(TrainingError, match="21 steps in a row were refused, the last because loss"):
        loop.run()


def test_no_false_alarm_in_a_thousand_clean_steps_of_a_real_run(tmp_path: Path) -> None:
    loop = make_toy(tmp_path, steps=1000, sensitivity=USUAL, checkpoint_steps=1000)
    loop.run()
    assert loop.step == 1000
    assert events(tmp_path) == []
    assert loop.guard.clip_bound(1e9) < 1e9


# PPO: the source has a part in it.


def make_ppo(folder: Path, **changes: Any) -> Loop[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    trunk = make_trunk()
    source = make_source(trunk, rounds=12, **changes)
    return Loop(
        trunk=trunk,
        objective=PPOObjective(clip=0.2, value=ValueLoss(0.2, 0.1)),
        source=source,
        optimizer=make_optimizer(trunk.trainable(POLICY), learning_rate=1e-3),
        learning_rate=lambda step: 1e-3,
        guard=Guard({"ratio_mean": 10.0}, replace(SHORT, window=20, warmup=10)),
        settings=Settings(clip_norm=1.0, checkpoint_steps=4, log_steps=1),
        folder=folder / "checkpoints",
        log=JsonlLog(folder / "metrics.jsonl"),
        title="ppo",
    )


def policy(loop: Loop[Any]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loop.trunk.state(POLICY).items()}


def head_of_reward(loop: Loop[Any]) -> dict[str, Tensor]:
    return {
        name.rsplit(".", 1)[1]: parameter.data
        for name, parameter in loop.trunk.trainable("reward").items()
        if name.startswith(f"head.{reward.HEAD}.")
    }


def test_a_clean_ppo_run_has_no_event(tmp_path: Path) -> None:
    loop = make_ppo(tmp_path)
    loop.run()
    assert loop.step == 48
    assert events(tmp_path) == []


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_reward_that_is_not_finite_is_named_before_anything_is_learned(tmp_path: Path, value: float) -> None:
    loop = make_ppo(tmp_path)
    head_of_reward(loop)["bias"].fill_(value)
    before = policy(loop)
    with pytest.raises(
        TrainingError, match=r"the reward model gave 12 of 12 responses a score that is not finite, in 4 rounds"
    ):
        loop.run()
    assert actions(tmp_path) == [(step, "passed over") for step in (1, 2, 3)]
    assert all(torch.equal(before[name], tensor) for name, tensor in policy(loop).items())


def test_a_reward_that_is_spoiled_for_a_round_costs_that_round(tmp_path: Path) -> None:
    loop = make_ppo(tmp_path)
    bias = head_of_reward(loop)["bias"]
    good = bias.clone()
    results = []

    def spoil(result: StepResult) -> None:
        results.append(result)
        bias.fill_(float("nan")) if result.step == 8 else bias.copy_(good)

    loop.after_step = (spoil,)
    loop.run()
    assert actions(tmp_path) == [(9, "passed over")]
    assert "the reward model gave 12 of 12" in events(tmp_path)[0]["skipped"]
    assert loop.step == 45  # 4 steps in each of 11 rounds, and 1
    assert loop.work == loop.source.total_work


def test_a_constant_reward_is_told_and_moves_nothing(tmp_path: Path) -> None:
    loop = make_ppo(tmp_path)
    head = head_of_reward(loop)
    head["weight"].zero_()
    head["bias"].fill_(3.0)
    before = policy(loop)
    loop.run()
    assert loop.step == 12  # each round is one step, to the end
    assert loop.work == loop.source.total_work
    assert all("the reward did not vary" in event["skipped"] for event in events(tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy(loop).items())


def test_after_going_back_the_round_of_the_damaged_policy_is_dropped(tmp_path: Path) -> None:
    loop = make_ppo(tmp_path, epochs=4)
    assert isinstance(loop.source, ExperienceSource)
    results: list[StepResult] = []

    def shake(result: StepResult) -> None:
        results.append(result)
        if result.step == 33:  # the first of round 4's eight steps
            draw = torch.Generator().manual_seed(0)
            for weight in loop.trunk.trainable(POLICY).values():
                weight.data += 3.0 * torch.randn(weight.shape, generator=draw)

    loop.after_step = (shake,)
    coefficients: list[float] = []
    observe = loop.source.observe

    def listen(result: StepResult) -> None:
        observe(result)
        coefficients.append(loop.source.state_dict()["controller"]["coefficient"])

    loop.source.observe = listen  # type: ignore[method-assign]
    loop.run()
    assert actions(tmp_path)[:4] == [(34, "skipped"), (35, "skipped"), (36, "skipped"), (37, "rewound")]
    assert events(tmp_path)[3]["rewound_to"] == 32
    assert coefficients[36] == coefficients[35]  # the KL of a policy that is gone steers nothing
    lines = {line["step"]: line for line in read_log(tmp_path / "metrics.jsonl")}
    assert (lines[37]["round"], lines[38]["round"]) == (4.0, 5.0)
    assert lines[38]["approximate_kl"] == 0.0
    assert lines[38]["ratio_mean"] == 1.0
    assert len(results) == 12 * 8 - 3
