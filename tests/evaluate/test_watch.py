"""Watching: looks when it should, touches nothing, stops on alarms, keeps the judge's best, and resumes to the bit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stackllama.errors import DataError
from stackllama.evaluate.hacking import Answers, Limits
from stackllama.evaluate.watch import Look, Seen, Settings, Watched, hold_back, look_at
from stackllama.model.roles import REFERENCE, LoRA, Trunk
from stackllama.objectives import kl, ppo, reward
from stackllama.objectives.ppo import PPORow
from stackllama.objectives.scaling import ScoreShaping
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY, ExperienceSource, PPOSettings
from stackllama.tokens.batches import Batch, StepResult
from stackllama.tokens.forest import Tree
from stackllama.tokens.tokenizer import Tokenizer
from stackllama.train import checkpoint
from stackllama.train.guard import Guard
from stackllama.train.loop import Loop, trained
from stackllama.train.loop import Settings as LoopSettings
from stackllama.train.metrics import JsonlLog, read_log
from stackllama.train.optim import make_optimizer
from tests.model.tiny import VOCABULARY, tiny_model

LIMITS = Limits(repetition=0.1, fences=0.05, length=2.0, perplexity=2.0, distance=1.0)
SETTINGS = Settings(
    rounds=6,
    every=2,
    kl_bound=4.0,
    stop=True,
    limits=LIMITS,
    resampling={"resamples": 200, "confidence": 0.95, "seed": 0},
)
ROUND = 3
"""Steps of a round of the short source."""


class Short:
    """Rounds of three batches without rows."""

    unit, total_work = "episodes", 18

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.step = 0

    @property
    def between_rounds(self) -> int | None:
        return None if self.step % ROUND else self.step // ROUND

    @property
    def stopped(self) -> str | None:
        return None if self.stop_after is None or self.step < ROUND * self.stop_after else "enough"

    def prepare(self) -> None: ...

    def next(self) -> Batch[PPORow] | None:
        return None if self.step == self.total_work or self.stopped is not None else Batch((), {}, 1, {})

    def observe(self, result: StepResult) -> None:
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


def seen(judge: float, nats: float, *, factor: float = 1.0, truth: float | None = None) -> Seen:
    """Eight answers, each `judge` above the SFT model's to both scorers, `factor` times as long."""
    score, flat = np.arange(8.0), np.full(8, 1.0)
    answers = Answers(nats * flat, score + judge, score + judge, 10 * factor * flat, flat, 0 * flat, 0 * flat)
    return Seen(answers, None if truth is None else truth + 0.01 * score)


class Watching:
    """The short source watched, where the policy's answers after each round are told beforehand."""

    def __init__(self, folder: Path, after: Mapping[int, Seen], settings: Settings = SETTINGS, **changed: Any) -> None:
        self.short = Short()
        self.looked: list[tuple[int, str]] = []
        self.told: list[str] = []
        self.path = folder / "watch.jsonl"

        def look(role: str) -> Seen:
            self.looked.append((self.short.step, role))
            return after[0 if role == REFERENCE else self.short.step // ROUND]

        def weights() -> Mapping[str, Tensor]:
            return {"w": torch.tensor(float(self.short.step))}

        settings = replace(settings, **changed)
        log = JsonlLog(self.path)
        self.watched = Watched(self.short, look, weights, settings=settings, log=log, tell=self.told.append)

    def train(self, steps: int | None = None) -> int:
        """So many steps, or all; gives how many were made."""
        made = 0
        while made != steps and self.watched.next() is not None:
            made += 1
            self.watched.observe(StepResult(self.short.step + 1, 0.0, {}, 0.0, None))
        return made


RISING = {0: seen(0, 0), 2: seen(1, 1), 4: seen(2, 2), 6: seen(3, 3)}


def test_it_looks_before_the_first_round_every_so_many_and_after_the_last(tmp_path: Path) -> None:
    watching = Watching(tmp_path, RISING)
    assert watching.train() == 18
    assert watching.looked == [(0, REFERENCE), (6, POLICY), (12, POLICY), (18, POLICY)]
    assert [line["rounds"] for line in read_log(watching.path)] == [0, 2, 4, 6]
    odd = Watching(tmp_path, RISING, every=4)
    assert odd.train() == 18
    assert [step for step, _ in odd.looked] == [0, 12, 18]
    assert [line["step"] for line in read_log(odd.path)] == [0, 12, 18]


def test_the_last_weights_stay_where_the_judge_likes_them_best(tmp_path: Path) -> None:
    watching = Watching(tmp_path, RISING)
    watching.train()
    choice = watching.watched.choice()
    assert (choice.step, choice.weights) == (18, None)
    assert "the last weights, which the judge scores highest" in choice.reason
    assert (watching.watched.stopped, watching.watched.alarming, watching.told) == (None, 0, [])


@pytest.mark.parametrize(
    ("after", "step", "words"),
    [
        ({2: seen(1, 1), 4: seen(2, 2), 6: seen(0.5, 3)}, 12, "5.500 at 2.00 nats, the last ones (step 18) 4.000 at 3"),
        ({2: seen(1, 1), 4: seen(2, 4.5), 6: seen(3, 5)}, 6, "at most 4 nats and no alarm: 4.500 at 1.00 nats"),
        ({2: seen(3, 3), 4: seen(3, 2), 6: seen(2, 1)}, 6, "6.500 at 3.00 nats"),  # the earliest of equals
    ],
)
def test_the_judges_best_at_bounded_kl_is_left(tmp_path: Path, after: dict[int, Seen], step: int, words: str) -> None:
    watching = Watching(tmp_path, {0: seen(0, 0), **after})
    watching.train()
    choice = watching.watched.choice()
    assert choice.step == step
    assert choice.weights == {"w": torch.tensor(float(step))}
    assert words in choice.reason


def test_where_none_is_within_the_bound_the_last_weights_stay(tmp_path: Path) -> None:
    watching = Watching(tmp_path, RISING, kl_bound=0.5)
    watching.train()
    choice = watching.watched.choice()
    assert (choice.step, choice.weights) == (18, None)
    assert "since there is none of the evaluations with a KL of at most 0.5 nats" in choice.reason


def test_an_alarm_ends_the_training_and_the_best_without_one_is_left(tmp_path: Path) -> None:
    watching = Watching(tmp_path, RISING | {4: seen(9, 1, factor=3)})
    assert watching.train() == 12
    assert watching.watched.rounds == 4
    assert watching.watched.stopped == "answers went from 10 to 30 tokens (limit: a factor of 2)"
    assert watching.told == [
        "alarm at step 12: answers went from 10 to 30 tokens (limit: a factor of 2)",
        "stopped by that alarm after 4 of 6 rounds",
    ]
    assert [line.get("alarms") for line in read_log(watching.path)] == [None, None, watching.watched.stopped]
    assert watching.watched.choice().step == 6


@pytest.mark.parametrize("alarm", [False, True])
def test_where_the_source_stops_the_policy_is_looked_at_once_more(tmp_path: Path, alarm: bool) -> None:
    watching = Watching(tmp_path, RISING | {3: seen(9, 1, factor=3) if alarm else seen(9, 1)})
    watching.short.stop_after = 3
    assert watching.train() == 9
    assert watching.looked == [(0, REFERENCE), (6, POLICY), (9, POLICY)]
    assert watching.watched.stopped == "enough"
    assert watching.watched.rounds == 3
    assert [text.partition(" at")[0] for text in watching.told] == ["alarm"] * alarm  # and no "stopped by that alarm"
    assert watching.watched.choice().step == (6 if alarm else 9)
    resumed = Watching(tmp_path, RISING)
    resumed.short.stop_after = 3
    resumed.watched.load_state_dict(watching.watched.state_dict())
    assert resumed.train() == 0
    assert (resumed.watched.stopped, resumed.looked) == ("enough", [])


def test_an_alarm_that_stops_nothing_is_told_and_not_chosen(tmp_path: Path) -> None:
    watching = Watching(tmp_path, RISING | {4: seen(9, 1, factor=3)}, stop=False)
    assert watching.train() == 18
    assert (watching.watched.stopped, watching.watched.alarming) == (None, 1)
    assert watching.watched.choice().step == 18


def test_an_alarm_after_the_last_round_stopped_nothing(tmp_path: Path) -> None:
    watching = Watching(tmp_path, RISING | {6: seen(9, 1, factor=3)})
    assert watching.train() == 18
    assert (watching.watched.stopped, watching.watched.alarming) == (None, 1)
    assert len(watching.told) == 1
    assert watching.watched.choice().step == 12


@pytest.mark.parametrize("stop_at", range(19))
def test_resumed_at_any_step_it_saw_the_same(tmp_path: Path, stop_at: int) -> None:
    after = {0: seen(0, 0, truth=0.1), 2: seen(2, 1, truth=0.2), 4: seen(1, 1, truth=0.3), 6: seen(1, 1, truth=0.4)}
    whole = Watching(tmp_path, after)
    whole.train()
    expected = read_log(whole.path)
    half = Watching(tmp_path, after)
    half.train(stop_at)
    state = half.watched.state_dict()
    half.train()  # what is done after the state was saved, and lost
    resumed = Watching(tmp_path, after)
    resumed.watched.load_state_dict(state)
    resumed.train()
    assert read_log(resumed.path) == expected
    assert resumed.watched.choice() == whole.watched.choice()


def test_an_alarm_is_still_one_after_resuming(tmp_path: Path) -> None:
    first = Watching(tmp_path, RISING | {4: seen(9, 1, factor=3)})
    first.train()
    resumed = Watching(tmp_path, RISING | {4: seen(9, 1, factor=3)})
    resumed.watched.load_state_dict(first.watched.state_dict())
    assert resumed.train() == 0
    assert resumed.watched.stopped == first.watched.stopped
    assert resumed.looked == []


def test_gold_is_logged_and_moves_no_choice_and_no_alarm(tmp_path: Path) -> None:
    gold = {at: replace(one, gold=np.linspace(0.0, 1.0 - at / 7, 8)) for at, one in RISING.items()}
    with_gold = Watching(tmp_path, gold)
    with_gold.train()
    lines = read_log(with_gold.path)
    assert [line["gold"] for line in lines] == pytest.approx([0.5, 5 / 14, 3 / 14, 1 / 14])
    assert lines[1]["gold_gain"] < 0
    without = Watching(tmp_path, RISING)
    without.train()
    assert with_gold.watched.choice() == without.watched.choice()
    assert [{k: v for k, v in line.items() if "gold" not in k} for line in lines] == read_log(without.path)


def test_prompts_are_held_back_once_and_for_all() -> None:
    prompts = [Tree((at,), (), at) for at in range(40)]
    trained, held = hold_back(prompts, 6, seed=3)
    assert len(held) == 6
    assert sorted([*trained, *held], key=lambda tree: tree.key) == prompts
    assert [tree.key for tree in held] == sorted(tree.key for tree in held)
    assert hold_back(prompts, 6, seed=3) == (trained, held)
    assert hold_back(prompts, 6, seed=4)[1] != held
    assert len(hold_back(prompts, 99, seed=3)[1]) == 10  # a quarter
    with pytest.raises(DataError, match=r"of 7 prompts .* set watch\.every to null"):
        hold_back(prompts[:7], 6, seed=3)


# From here on the real source, sampler, roles and loop.

TOKENIZER = Tokenizer.train(["Question: what is a hop?\n\nAnswer: a plant"] * 3, VOCABULARY + 244)
EOS = 2


class StopHereError(Exception):
    pass


def make_prompts() -> list[Tree]:
    draw = random.Random(0)
    return [Tree(tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(3, 9))), (), at) for at in range(20)]


def make_trunk() -> Trunk:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    for seed, role in enumerate((POLICY, "reward", "judge")):
        dropout = 0.1 if role == POLICY else 0.0  # so that the random generator's state matters
        trunk.add_adapter(role, LoRA(4, 8.0, dropout, ("q_proj", "v_proj", "up_proj")), seed=seed)
    trunk.add_head(POLICY, ppo.HEAD, spread=0.0, seed=0)
    for seed, role in enumerate(("reward", "judge")):
        trunk.add_head(role, reward.HEAD, spread=0.3, seed=seed)
    return trunk


def make_source(trunk: Trunk, prompts: Sequence[Tree], *, value_role: str = POLICY, **changes: Any) -> ExperienceSource:
    return ExperienceSource(
        trunk,
        prompts,
        settings=PPOSettings(
            rounds=3,
            prompts=4,
            samples=2,
            epochs=2,
            minibatches=2,
            gamma=1.0,
            gae_lambda=0.95,
            whiten=True,
            missing_eos_penalty=1.0,
            kl_in_reward=True,
            kl_stop=None,
            row_tokens=256,
            **changes,
        ),
        sampling=Sampling(seed=1, max_new_tokens=8, eos_id=EOS),
        controller=kl.FixedController(0.1),
        estimator=kl.k1,
        shaping=ScoreShaping(scaling=False, clip=None),
        estimate=None,
        reward_role="reward",
        value_role=value_role,
    )


def make_look(trunk: Trunk, prompts: Sequence[Tree]) -> Look:
    how = Sampling(seed=2, max_new_tokens=8, eos_id=EOS)
    return look_at(trunk, TOKENIZER, prompts, how, gold=lambda prompt, text: prompt.key / 20, row_tokens=64)


def add_value(trunk: Trunk) -> None:
    """A value of its own, with a head that says something."""
    trunk.add_adapter("value", LoRA(4, 8.0, 0.1, ("q_proj", "v_proj")), seed=9)
    trunk.add_head("value", ppo.HEAD, spread=0.3, seed=9)


def make_loop(
    folder: Path, *, watched: bool, stop_at: int | None = None, own_value: bool = False, **changes: Any
) -> Loop[PPORow]:
    folder.mkdir(exist_ok=True)
    trunk = make_trunk()
    beside = [ppo.ValueObjective(ppo.ValueLoss(0.2, 0.1))] if own_value else []
    if own_value:
        del trunk.heads[f"{POLICY}/{ppo.HEAD}"]
        add_value(trunk)
        changes["value_role"] = "value"
    prompts, held = hold_back(make_prompts(), 5, seed=0)
    source: ExperienceSource | Watched[PPORow] = make_source(trunk, prompts, **changes)
    if watched:
        settings = replace(SETTINGS, rounds=3, every=1, stop=False, kl_bound=100.0)
        log = JsonlLog(folder / "watch.jsonl")
        look = make_look(trunk, held)
        assert isinstance(source, ExperienceSource)
        source = Watched(source, look, lambda: trunk.state(POLICY), settings=settings, log=log, tell=lambda text: None)
    torch.manual_seed(7)

    def interrupt(result: StepResult) -> None:
        if result.step == stop_at:
            raise StopHereError

    return Loop(
        trunk=trunk,
        objective=(objective := ppo.PPOObjective(clip=0.2, value=None if own_value else ppo.ValueLoss(0.2, 0.1))),
        source=source,
        optimizer=make_optimizer(trained(trunk, objective, beside), learning_rate=3e-2),
        learning_rate=lambda step: 3e-2,
        guard=Guard(None),
        settings=LoopSettings(clip_norm=1.0, checkpoint_steps=3, log_steps=1),
        folder=folder / "checkpoints",
        log=JsonlLog(folder / "metrics.jsonl"),
        title="test",
        after_step=(interrupt,),
        beside=beside,
    )


def weights(loop: Loop[PPORow]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loop.trunk.state(POLICY).items()}


def chosen(loop: Loop[PPORow]) -> tuple[int, dict[str, Tensor]]:
    assert isinstance(loop.source, Watched)
    choice = loop.source.choice()
    return choice.step, dict(choice.weights or weights(loop))


def test_watching_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    plain = make_loop(tmp_path / "plain", watched=False)
    plain.run()
    watched = make_loop(tmp_path / "watched", watched=True)
    watched.run()
    assert watched.step == plain.step == 12
    assert read_log(tmp_path / "plain" / "metrics.jsonl") == read_log(tmp_path / "watched" / "metrics.jsonl")
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(watched).items())
    lines = read_log(tmp_path / "watched" / "watch.jsonl")
    assert [(line["step"], line["prompts"]) for line in lines] == [(0, 5), (4, 5), (8, 5), (12, 5)]
    assert lines[0]["kl"] == 0.0
    assert all(line["kl"] > 0 for line in lines[1:])
    assert {line["reward_gain"] for line in lines} != {0.0}


def test_a_look_draws_from_no_random_generator_and_leaves_weights_alone() -> None:
    trunk, (_, held) = make_trunk(), hold_back(make_prompts(), 5, seed=0)
    state = torch.get_rng_state()
    before = {role: {n: t.clone() for n, t in trunk.state(role).items()} for role in (POLICY, "reward", "judge")}
    first, again = (make_look(trunk, held)(POLICY) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(first.answers.reward, again.answers.reward)
    assert first.gold is not None
    assert first.gold.tolist() == [tree.key / 20 for tree in held]
    for role, tensors in before.items():
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in trunk.state(role).items())
    assert trunk.active is None


def test_killed_and_resumed_it_ends_with_the_same_bits_log_and_choice(tmp_path: Path) -> None:
    whole = make_loop(tmp_path / "whole", watched=True)
    whole.run()
    step, expected = chosen(whole)
    for stop_at in (2, 4, 5, 9, 12):
        folder = tmp_path / str(stop_at)
        with pytest.raises(StopHereError):
            make_loop(folder, watched=True, stop_at=stop_at).run()
        torch.manual_seed(99)
        resumed = make_loop(folder, watched=True)
        resumed.run()
        assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())
        for name in ("metrics.jsonl", "watch.jsonl"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        again, found = chosen(resumed)
        assert again == step
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_policy_does_not_move_while_the_value_warms_up_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in make_trunk().state(POLICY).items()}
    whole = make_loop(tmp_path / "whole", watched=False, value_warmup=2)
    whole.run()
    with pytest.raises(StopHereError):
        make_loop(tmp_path / "half", watched=False, value_warmup=2, stop_at=8).run()
    warmed = checkpoint.load_latest(tmp_path / "half" / "checkpoints")
    assert warmed is not None
    moved = {name for name, tensor in warmed[1]["weights"].items() if not torch.equal(tensor, before[name])}
    assert warmed[0] == 6
    assert moved == {"head.value.weight", "head.value.bias"}
    moved = {name for name, tensor in weights(whole).items() if not torch.equal(tensor, before[name])}
    assert moved == set(before)
    torch.manual_seed(99)
    resumed = make_loop(tmp_path / "half", watched=False, value_warmup=2)
    resumed.run()
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())
    assert (tmp_path / "half" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_value_of_its_own_learns_in_the_same_steps_and_resumes_to_the_same_bits(tmp_path: Path, warmup: int) -> None:
    def all_weights(loop: Loop[PPORow]) -> dict[str, Tensor]:
        return {
            f"{role}/{name}": tensor.clone()
            for role in (POLICY, "value")
            for name, tensor in loop.trunk.state(role).items()
        }

    whole = make_loop(tmp_path / "whole", watched=True, own_value=True, value_warmup=warmup)
    before = all_weights(whole)
    whole.run()
    after = all_weights(whole)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(after)
    lines = read_log(tmp_path / "whole" / "metrics.jsonl")
    assert {"policy_loss", "value_loss", "value_clip_fraction", "explained_variance"} <= lines[0].keys()
    assert [line["gradient_norm"] == 0.0 for line in lines] == [at < 4 * warmup for at in range(12)]  # 4 steps a round
    assert all(line["value_gradient_norm"] > 0 for line in lines)
    half = tmp_path / "half"
    with pytest.raises(StopHereError):
        make_loop(half, watched=True, own_value=True, value_warmup=warmup, stop_at=8).run()
    saved = checkpoint.load_latest(half / "checkpoints")
    assert saved is not None
    moved = {
        name for name, tensor in saved[1]["weights"].items() if not torch.equal(tensor, before[f"{POLICY}/{name}"])
    }
    assert bool(moved) is (warmup == 0)
    assert not torch.equal(saved[1]["beside"]["value"]["head.value.weight"], before["value/head.value.weight"])
    torch.manual_seed(99)
    resumed = make_loop(half, watched=True, own_value=True, value_warmup=warmup)
    resumed.run()
    assert all(torch.equal(tensor, after[name]) for name, tensor in all_weights(resumed).items())
    for name in ("metrics.jsonl", "watch.jsonl"):
        assert (half / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
