from __future__ import annotations

import math
import statistics

import pytest
import torch

from stackllama.errors import CheckpointError, TrainingError
from stackllama.objectives.scaling import RunningDeviation, ScoreShaping


def test_by_hand() -> None:
    spread = RunningDeviation()
    assert spread.scale == 1.0  # nothing seen yet
    spread.update(torch.tensor([1.0, 3.0]))  # mean 2, squared distances 1 and 1: deviation 1
    assert spread.scale == pytest.approx(1.0)
    spread.update(torch.tensor([5.0, 7.0]))  # 1 3 5 7: mean 4, squared distances 9 1 1 9, a fourth of 20 is 5
    assert spread.scale == pytest.approx(math.sqrt(5))


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 20, 17]])
def test_how_scores_fall_into_batches_does_not_matter(sizes: list[int]) -> None:
    score_S = 1000.0 + torch.randn(40, generator=torch.Generator().manual_seed(0))
    spread = RunningDeviation()
    for part in score_S.split(sizes):
        spread.update(part)
    assert spread.scale == pytest.approx(statistics.pstdev(score_S.tolist()), rel=1e-9)


def test_scores_that_hardly_differ_are_left_as_they_are() -> None:
    spread = RunningDeviation()
    spread.update(torch.tensor([2.0, 2.0000002]))
    assert spread.scale == 1.0
    spread.update(torch.tensor([4.0]))
    assert 0.9 < spread.scale < 1.0  # two at 2, one at 4: the root of 8 / 9


def test_a_resumed_one_goes_on_with_the_same_bits() -> None:
    first, second = RunningDeviation(), RunningDeviation()
    first.update(torch.tensor([0.1, 0.7, -3.0]))
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        one.update(torch.tensor([0.3, 11.0]))
    assert second.state_dict() == first.state_dict()
    assert second.scale == first.scale


@pytest.mark.parametrize("key", ["count", "mean", "squares"])
def test_a_missing_key_is_missed(key: str) -> None:
    state = RunningDeviation().state_dict()
    del state[key]
    with pytest.raises(CheckpointError, match="needed are count, mean, squares"):
        RunningDeviation().load_state_dict(state)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(score: float) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        RunningDeviation().update(torch.tensor([1.0, score]))


def test_shaping_by_hand() -> None:
    # 1 and 3 have deviation 1: 1 stays, 3 is cut to 2. With 5 and 13 the squared distances from the mean 5.5 are 20.25,
    # 6.25, 0.25 and 56.25; a fourth of their sum 83 is 20.75, its root 4.555217: 5 / 4.555217 = 1.097643, and
    # 13 / 4.555217 = 2.853870 is cut to 2.
    shaping = ScoreShaping(scaling=True, clip=2.0)
    score_S, notes = shaping.shape(torch.tensor([1.0, 3.0]))
    assert score_S.tolist() == [1.0, 2.0]
    assert notes == {"reward_scale": 1.0, "reward_clipped": 0.5}
    score_S, notes = shaping.shape(torch.tensor([5.0, 13.0]))
    assert score_S.tolist() == pytest.approx([1.097643, 2.0])
    assert notes == pytest.approx({"reward_scale": 4.555217, "reward_clipped": 0.5})


def test_scores_are_clipped_on_both_sides_or_left_alone() -> None:
    score_S = torch.tensor([-7.0, -0.5, 0.5, 7.0])
    assert ScoreShaping(scaling=False, clip=0.5).shape(score_S)[0].tolist() == [-0.5, -0.5, 0.5, 0.5]
    assert ScoreShaping(scaling=False, clip=0.5).shape(score_S)[1] == {"reward_clipped": 0.5}
    same_S, notes = ScoreShaping(scaling=False, clip=None).shape(score_S)
    assert torch.equal(same_S, score_S)
    assert notes == {}


def test_a_clip_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip is 0\.0, allowed is a number above 0"):
        ScoreShaping(scaling=False, clip=0.0)
