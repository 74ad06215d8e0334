"""Sampler and trainer apart: hand-worked weights, and the limit that finds a sampler that lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from stackllama.errors import TrainingError
from stackllama.model.roles import Role
from stackllama.rollout.engine import Request, Response, Sampler, Sampling, sample
from stackllama.rollout.mismatch import Mismatch, truncated_weights
from tests.rollout.test_experience import make_source, make_trunk, of_first_round, result


def test_weights_worked_by_hand() -> None:
    # By trainer over sampler: 0.2 / 0.1 = 2, 0.1 / 0.4 = 0.25, 0.9 / 0.1 = 9 -> 3, 0.3 / 0.1 = 3, 0.5 / 0.5 = 1.
    trainer, sampler = torch.tensor([0.2, 0.1, 0.9, 0.3, 0.5]).log(), torch.tensor([0.1, 0.4, 0.1, 0.1, 0.5]).log()
    assert truncated_weights(trainer, sampler, cap=3.0).tolist() == pytest.approx([2.0, 0.25, 3.0, 3.0, 1.0])
    # A small weight is not cut: only the large ones make the gradient's variance.
    assert truncated_weights(trainer, sampler, cap=1.0).tolist() == pytest.approx([1.0, 0.25, 1.0, 1.0, 1.0])


def test_no_gradient_goes_through_the_weight() -> None:
    trainer = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not truncated_weights(trainer, torch.tensor([-1.5, -1.5]), cap=2.0).requires_grad


def test_what_is_logged() -> None:
    trainer, sampler = torch.tensor([0.2, 0.1, 0.9, 0.5]).log(), torch.tensor([0.1, 0.4, 0.1, 0.5]).log()
    weight, notes = Mismatch(cap=4.0, limit=2.0).weights(trainer, sampler)
    assert weight is not None
    # |differences| ln 2, ln 4, ln 9, 0; weights 2, 0.25, 4 (cut from 9), 1.
    assert notes == pytest.approx(
        {
            "sampler_difference": math.log(72) / 4,
            "sampler_difference_max": math.log(9),
            "importance_weight": 7.25 / 4,
            "importance_truncated": 0.25,
        }
    )
    alone, notes = Mismatch(cap=None, limit=2.0).weights(trainer, sampler)
    assert alone is None
    assert set(notes) == {"sampler_difference", "sampler_difference_max"}


@pytest.mark.parametrize("wrong", [-0.6, 0.6, math.nan])
def test_over_the_limit_training_ends(wrong: float) -> None:
    trainer = torch.full((5,), -1.0)
    sampler = trainer - torch.tensor([0.0, 0.0, 0.0, 0.0, wrong])
    Mismatch(cap=None, limit=0.13).weights(trainer, trainer)
    with pytest.raises(TrainingError, match=r"over 5 sampled.*sampler_difference_limit allows 0\.1.*ppo\.sampler own"):
        Mismatch(cap=2.0, limit=0.1).weights(trainer, sampler)  # 0.6 / 5 = 0.12
    if not math.isnan(wrong):
        Mismatch(cap=2.0, limit=0.13).weights(trainer, sampler)


def lying(by: float) -> Sampler:
    """A sampler that states other log-probabilities than those that it drew from."""

    def sampler(role: Role, requests: Sequence[Request], how: Sampling, /) -> list[Response]:
        return [
            replace(one, logprobs=tuple(logprob - by for logprob in one.logprobs))
            for one in sample(role, requests, how)
        ]

    return sampler


def test_a_sampler_that_lies_is_found() -> None:
    source = make_source(make_trunk(), sampler=lying(0.05), mismatch=Mismatch(cap=None, limit=0.04))
    with pytest.raises(TrainingError, match=r"are 0\.05 nats a token from the trainer's.*allows 0\.04"):
        source.next()


def test_our_own_sampler_is_within_the_limit_of_fp32_and_is_not_weighted() -> None:
    source = make_source(make_trunk(), mismatch=Mismatch(cap=None, limit=1e-3))
    batch = source.next()
    assert batch is not None
    assert batch.notes["sampler_difference"] <= batch.notes["sampler_difference_max"] < 1e-4
    assert all(row.weight_N is None for row in batch.rows)


@pytest.mark.parametrize(("by", "weight"), [(0.1, math.exp(0.1)), (1.0, 1.5), (-0.5, math.exp(-0.5))])
def test_rows_carry_the_weights_of_their_tokens_and_keep_them_when_resumed(by: float, weight: float) -> None:
    source = make_source(make_trunk(), sampler=lying(by), mismatch=Mismatch(cap=1.5, limit=2.0))
    resumed = make_source(make_trunk())
    first = source.next()
    assert first is not None
    source.observe(result())
    resumed.load_state_dict(source.state_dict())
    rows = [*first.rows, *of_first_round(resumed)]
    assert len(rows) > len(first.rows)
    for row in rows:
        assert row.weight_N is not None
        assert row.weight_N.shape == row.old_logprob_N.shape
        assert row.weight_N.tolist() == pytest.approx([weight] * len(row.weight_N), rel=1e-4)
