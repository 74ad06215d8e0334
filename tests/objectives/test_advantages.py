from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stackllama.objectives.advantages import gae


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sequence_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rewards_N, values_N = torch.randn((2, sum(lengths)), generator=generator, dtype=torch.float64)
    return rewards_N, values_N, sequence_N


def test_by_hand() -> None:
    # gamma 1/2, lambda 1/2, so gamma * lambda = 1/4.
    # Response 0 has rewards 1 0 2 and values 4 2 8; response 1 has reward 3 and value 1.
    # delta: 1 + 2/2 - 4 = -2;  0 + 8/2 - 2 = 2;  2 + 0 - 8 = -6 (nothing follows);     3 + 0 - 1 = 2.
    # A from the end: -6;  2 - 6/4 = 0.5;  -2 + 0.5/4 = -1.875;                          2.
    # returns A + V: 2.125, 2.5, 2;                                                      3.
    advantages_N, returns_N = gae(
        torch.tensor([1.0, 0.0, 2.0, 3.0]),
        torch.tensor([4.0, 2.0, 8.0, 1.0]),
        torch.tensor([0, 0, 0, 1]),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages_N.tolist() == [-1.875, 0.5, -6.0, 2.0]
    assert returns_N.tolist() == [2.125, 2.5, 2.0, 3.0]


def test_lambda_1_is_the_discounted_return_minus_the_value() -> None:
    rewards_N, values_N, sequence_N = ragged([4, 1, 7])
    advantages_N, returns_N = gae(rewards_N, values_N, sequence_N, gamma=0.9, lam=1.0)
    expected = []
    for start, end in ((0, 4), (4, 5), (5, 12)):
        expected += [sum(0.9 ** (u - t) * rewards_N[u].item() for u in range(t, end)) for t in range(start, end)]
    torch.testing.assert_close(returns_N, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(advantages_N, torch.tensor(expected, dtype=torch.float64) - values_N)


def test_lambda_0_is_the_one_step_td_error() -> None:
    rewards_N, values_N, sequence_N = ragged([3, 2])
    advantages_N, _ = gae(rewards_N, values_N, sequence_N, gamma=0.9, lam=0.0)
    r, v = rewards_N.tolist(), values_N.tolist()
    expected = [
        r[0] + 0.9 * v[1] - v[0],
        r[1] + 0.9 * v[2] - v[1],
        r[2] - v[2],
        r[3] + 0.9 * v[4] - v[3],
        r[4] - v[4],
    ]
    torch.testing.assert_close(advantages_N, torch.tensor(expected, dtype=torch.float64))


def test_a_response_does_not_depend_on_the_others_nor_on_their_order() -> None:
    rewards_N, values_N, sequence_N = ragged([5, 2, 9])
    together, _ = gae(rewards_N, values_N, sequence_N, gamma=1.0, lam=0.95)
    for start, end in ((0, 5), (5, 7), (7, 16)):
        zeros = torch.zeros(end - start, dtype=torch.int64)
        alone, _ = gae(rewards_N[start:end], values_N[start:end], zeros, gamma=1.0, lam=0.95)
        assert torch.equal(alone, together[start:end])
    order = torch.cat([torch.arange(7, 16), torch.arange(0, 7)])
    moved, _ = gae(rewards_N[order], values_N[order], sequence_N[order], gamma=1.0, lam=0.95)
    assert torch.equal(moved, together[order])


def test_nothing_flows_back() -> None:
    rewards_N, values_N, sequence_N = ragged([2])
    advantages_N, returns_N = gae(rewards_N, values_N.requires_grad_(), sequence_N, gamma=1.0, lam=1.0)
    assert not advantages_N.requires_grad
    assert not returns_N.requires_grad


def test_no_tokens() -> None:
    nothing = torch.zeros(0)
    advantages_N, returns_N = gae(nothing, nothing, torch.zeros(0, dtype=torch.int64), gamma=1.0, lam=1.0)
    assert (advantages_N.shape, returns_N.shape) == ((0,), (0,))


def test_refuses_what_it_cannot_do_right() -> None:
    rewards_N, values_N, sequence_N = ragged([2, 2])
    with pytest.raises(ValueError, match=r"lam is 1\.5, allowed is 0 to 1"):
        gae(rewards_N, values_N, sequence_N, gamma=1.0, lam=1.5)
    with pytest.raises(ValueError, match="float32 or float64"):
        gae(rewards_N.bfloat16(), values_N.bfloat16(), sequence_N, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="shapes"):
        gae(rewards_N[:3], values_N, sequence_N, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="not contiguous"):
        gae(rewards_N, values_N, torch.tensor([0, 1, 0, 1]), gamma=1.0, lam=1.0)
