from __future__ import annotations

import pytest

from stackllama.rollout.curriculum import admitted, competence
from stackllama.tokens.forest import Tree


@pytest.mark.parametrize(
    ("progress", "share"),
    [
        (0.0, 0.25),
        (0.25, 0.544862),  # (0.25 * 0.9375 + 0.0625) ** 0.5 = 0.296875 ** 0.5
        (0.5, 0.728869),  # 0.53125 ** 0.5
        (1.0, 1.0),
    ],
)
def test_competence_by_hand(progress: float, share: float) -> None:
    assert competence(progress, 0.25) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize(("progress", "start"), [(-0.1, 0.5), (1.1, 0.5), (0.5, 0.0), (0.5, 1.1)])
def test_what_is_no_share_is_refused(progress: float, start: float) -> None:
    with pytest.raises(ValueError, match="allowed are 0 to 1"):
        competence(progress, start)


def test_the_shortest_come_first_and_all_in_the_last_round() -> None:
    lengths = [7, 3, 9, 3, 5, 1, 8, 2, 6, 4] * 2
    prompts = [Tree((5,) * length, (), key) for key, length in enumerate(lengths)]
    pools = [admitted(prompts, at, rounds=5, least=5) for at in range(7)]
    # Of 20 prompts, from 5 on: 0.544862 and 0.728869 as above, and (0.75 * 0.9375 + 0.0625) ** 0.5 = 0.875.
    assert [len(pool) for pool in pools] == [5, 11, 15, 18, 20, 20, 20]
    assert [len(tree.root) for tree in pools[0]] == [1, 1, 2, 2, 3]
    assert [tree.key for tree in pools[0]] == [5, 15, 7, 17, 1]
    assert pools[-1] == prompts
    for pool in pools[1:-3]:
        left_out = [tree for tree in prompts if tree not in pool]
        assert max(len(tree.root) for tree in pool) <= min(len(tree.root) for tree in left_out)


def test_over_one_round_there_is_no_curriculum() -> None:
    prompts = [Tree((5,) * length, (), length) for length in (3, 1, 2)]
    assert admitted(prompts, 0, rounds=1, least=1) == prompts
