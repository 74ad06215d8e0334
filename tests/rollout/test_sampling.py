"""Keyed noise and exact draws."""

from __future__ import annotations

import math

import pytest
import torch

from stackllama.rollout.sampling import draw, request_seeds, reshape_distribution, uniforms


def test_noise_is_a_function_of_its_three_keys() -> None:
    base = uniforms(1, [5, 6, 5], [0, 0, 1])
    assert len(set(base.tolist())) == 3
    assert uniforms(1, [6], [0]).item() == base[1].item()
    assert uniforms(2, [6], [0]).item() != base[1].item()


def test_the_noise_of_a_seed_and_its_keys_never_changes() -> None:
    # A run that is resumed under another version goes on with the same samples.
    assert uniforms(1, [5, 6], [0, 3]).tolist() == [0.5144317930624774, 0.546038902680294]


def test_a_requests_seed_is_a_function_of_its_two_keys() -> None:
    seeds = request_seeds(1, range(1000))
    assert len(set(seeds)) == 1000
    assert request_seeds(1, [7]) == [seeds[7]]
    assert not set(request_seeds(2, range(1000))) & set(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_is_uniform_and_uncorrelated_along_requests_and_tokens() -> None:
    count = 20_000
    for noise in (uniforms(0, range(count), [7] * count), uniforms(0, [7] * count, range(count))):
        # The mean of n uniforms has deviation 1 / sqrt(12 n) = 0.002; their lag-1 correlation 1 / sqrt(n) = 0.007.
        assert abs(noise.mean() - 0.5) < 0.01
        assert abs(noise.var() - 1 / 12) < 0.003
        assert abs(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]) < 0.03
        assert noise.min() >= 0
        assert noise.max() < 1


def test_draw_picks_the_token_whose_share_holds_the_number() -> None:
    logprob = torch.tensor([[0.2, 0.5, 0.0, 0.3]]).log()
    # Cumulative shares: 0.2, 0.7, 0.7, 1. The third token has no share and is never drawn.
    for number, token in ((0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 3), (0.999999, 3)):
        assert draw(logprob, torch.tensor([number], dtype=torch.float64)).item() == token


def test_frequencies_of_draws_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.25, 0.05])
    noise = uniforms(0, range(40_000), [0] * 40_000)
    tokens = draw(probabilities.log().expand(40_000, 4), noise)
    found = torch.bincount(tokens, minlength=4) / 40_000
    assert torch.allclose(found, probabilities, atol=0.01)  # 4 deviations of the rarest to meet it


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    logprob = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    # 0.5 alone is below 0.7; with 0.3 it is reached. Renormalised: 5/8 and 3/8.
    shaped = reshape_distribution(logprob, temperature=1.0, top_p=0.7).exp()
    assert shaped.tolist()[0] == pytest.approx([0.625, 0.375, 0.0, 0.0])


def test_temperature_half_squares_and_renormalises() -> None:
    logprob = torch.tensor([[0.8, 0.2]]).log()
    # 0.64 / (0.64 + 0.04) and 0.04 / 0.68
    shaped = reshape_distribution(logprob, temperature=0.5, top_p=1.0)
    assert shaped.tolist()[0] == pytest.approx([math.log(0.64 / 0.68), math.log(0.04 / 0.68)], abs=1e-6)
