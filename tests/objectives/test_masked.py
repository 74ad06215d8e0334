from __future__ import annotations

import math

import pytest
import torch

from stackllama.objectives.masked import columns, sum_per_sequence, to_matrix, whiten


def test_columns_count_from_zero_in_each_response_whatever_their_order() -> None:
    assert columns(torch.tensor([1, 1, 0, 2, 2, 2])).tolist() == [0, 1, 0, 0, 1, 2]
    assert columns(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_columns_refuse_a_response_in_two_pieces() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        columns(torch.tensor([0, 0, 1, 0]))


def test_to_matrix_puts_each_token_at_its_place_and_zeros_elsewhere() -> None:
    sequence_N = torch.tensor([0, 0, 0, 1, 1])
    x_N = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    x_TS = to_matrix(x_N, sequence_N, columns(sequence_N), 3)
    assert x_TS.tolist() == [[1, 4, 0], [2, 5, 0], [3, 0, 0]]
    assert torch.equal(x_TS[columns(sequence_N), sequence_N], x_N)


@pytest.mark.parametrize("sequence", [[0, 0, 3], [-1, 0, 0]])
def test_to_matrix_refuses_a_sequence_outside_its_columns(sequence: list[int]) -> None:
    with pytest.raises(ValueError, match=r"allowed are 0\.\.2"):
        sum_per_sequence(torch.ones(3), torch.tensor(sequence), 3)


def test_sum_per_sequence() -> None:
    sums = sum_per_sequence(torch.tensor([1.0, -2.0, 4.0, 0.5]), torch.tensor([0, 0, 2, 2]), 4)
    assert sums.tolist() == [-1.0, 0.0, 4.5, 0.0]  # 1 - 2; no token; 4 + 0.5; no token
    assert sum_per_sequence(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2).tolist() == [0.0, 0.0]


def test_sum_per_sequence_loses_no_digits_to_a_large_neighbour() -> None:
    # In float32 1e8 + 1 = 1e8, so adding one by one would end at 0.
    sums = sum_per_sequence(torch.tensor([1e8, 1.0, -1e8]), torch.zeros(3, dtype=torch.int64), 1)
    assert sums.tolist() == [1.0]


def test_sum_per_sequence_hands_each_token_the_gradient_of_its_own_response() -> None:
    x_N = torch.ones(3, requires_grad=True)
    (sum_per_sequence(x_N, torch.tensor([0, 0, 1]), 2) * torch.tensor([5.0, 7.0])).sum().backward()
    assert x_N.grad is not None
    assert x_N.grad.tolist() == [5.0, 5.0, 7.0]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_whitened_numbers_have_mean_0_and_deviation_1(scale: float) -> None:
    x_N = scale * (3 + torch.randn(500, generator=torch.Generator().manual_seed(0)))
    white_N = whiten(x_N).double()
    assert abs(white_N.mean().item()) < 1e-6
    assert white_N.std(correction=0).item() == pytest.approx(1, abs=2e-5)


def test_whitening_by_hand() -> None:
    # mean of 1, 2, 6 is 3; squared distances 4, 1, 9, their mean 14/3.
    deviation = math.sqrt(14 / 3)
    expected = torch.tensor([-2.0, -1.0, 3.0]) / deviation
    torch.testing.assert_close(whiten(torch.tensor([1.0, 2.0, 6.0])), expected)
    torch.testing.assert_close(whiten(torch.tensor([1.0, 2.0, 6.0]), shift_mean=False), expected + 3)


def test_whitening_equal_numbers_gives_zeros_not_nan() -> None:
    assert whiten(torch.full((1000,), 0.1)).tolist() == [0.0] * 1000
    assert whiten(torch.tensor([5.0])).tolist() == [0.0]
    assert whiten(torch.zeros(0)).tolist() == []
