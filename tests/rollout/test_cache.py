"""Rows of the cache: prompts come in behind those that run, and the last row takes the place of one that leaves."""

from __future__ import annotations

import torch

from stackllama.model.attention import Rule
from stackllama.rollout.cache import SequenceCache
from stackllama.tokens.forest import Segment

RULE = Rule(1.0)


def filled(*lengths: int) -> tuple[SequenceCache, torch.Tensor]:
    """A cache of three slots with prompts of these lengths out of one row, and the row's keys (1, 1, T, 2)."""
    cache = SequenceCache(3, places=6, device=torch.device("cpu"))
    ends = [sum(lengths[: at + 1]) for at in range(len(lengths))]
    segments = [Segment(end - length, end, end - length, end) for end, length in zip(ends, lengths, strict=True)]
    row = torch.randn(1, 1, ends[-1], 2, generator=torch.Generator().manual_seed(0))
    cache.expect(segments)
    cache.record(0, row, row)
    cache.arrive()
    return cache, row


def attended(cache: SequenceCache, token: torch.Tensor) -> torch.Tensor:
    """What a token whose query, key and value are these (R, 2) gathers in each sequence (R, 2)."""
    one = token[:, None, None]
    return cache.attend(0, one, one, one, RULE)[:, 0, 0]


def expected(own: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    seen = torch.cat([own, token[None]])
    return torch.softmax(seen @ token, 0) @ seen


def test_a_token_sees_its_own_prompt_and_itself() -> None:
    cache, row = filled(2, 3)
    assert cache.lengths_R.tolist() == [2, 3]
    token = torch.tensor([[0.5, -1.0], [2.0, 0.25]])
    found = attended(cache, token)
    for own, one, got in zip((row[0, 0, :2], row[0, 0, 2:]), token, found, strict=True):
        assert torch.allclose(got, expected(own, one), atol=1e-6)
    cache.grow()
    assert cache.lengths_R.tolist() == [3, 4]


def test_the_last_sequence_takes_the_row_of_one_that_leaves_and_a_new_one_comes_behind() -> None:
    cache, row = filled(2, 3, 1)
    cache.leave(0)
    assert cache.lengths_R.tolist() == [1, 3]
    token = torch.tensor([[0.5, -1.0], [2.0, 0.25]])
    found = attended(cache, token)
    assert torch.allclose(found[0], expected(row[0, 0, 5:], token[0]), atol=1e-6)
    assert torch.allclose(found[1], expected(row[0, 0, 2:5], token[1]), atol=1e-6)
    cache.expect([Segment(0, 4, 0, 4)])
    new = torch.randn(1, 1, 4, 2, generator=torch.Generator().manual_seed(1))
    cache.record(0, new, new)
    cache.arrive()
    assert cache.lengths_R.tolist() == [1, 3, 4]
    token = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(attended(cache, token)[2], expected(new[0, 0], token[2]), atol=1e-6)


def test_the_last_row_just_leaves() -> None:
    cache, _ = filled(2, 3)
    cache.leave(1)
    assert cache.lengths_R.tolist() == [2]
