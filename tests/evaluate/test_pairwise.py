"""From verdicts to numbers, worked by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from stackllama.evaluate.pairwise import Compared, numbers, win
from stackllama.evaluate.statistics import Resampling

HOW: Resampling = {"resamples": 500, "confidence": 0.95, "seed": 3}


def said(both: str, *, longer: int = 0, equal: bool = False, scores: Mapping[str, float] | None = None) -> Compared:
    """both: the verdict with the policy first, then with it second; `?` for what cannot be read."""
    straight, swapped = (None if sign == "?" else sign for sign in both)
    return Compared(straight, swapped, equal, longer, scores or {})


@pytest.mark.parametrize(
    ("both", "worth"),
    [
        ("AB", 1.0),  # the policy's answer in both orders
        ("BA", 0.0),
        ("AA", 0.5),  # the place, not the answer
        ("BB", 0.5),
        ("CC", 0.5),
        ("AC", 0.5),  # a win in one order alone is none
        ("CB", 0.5),
        ("BC", 0.5),
        ("CA", 0.5),
    ],
)
def test_a_win_needs_both_orders(both: str, worth: float) -> None:
    assert win(said(both)) == worth


def test_every_number() -> None:
    judge = {"judge": 1.0}
    compared = [
        said("AB", scores=judge | {"gold": 0.2}),
        said("AB", scores={"judge": -1.0, "gold": 0.1}),
        said("BA", scores={"judge": -2.0, "gold": 0.0}),
        said("AA", scores=judge),
        said("AC", scores=judge),
        said("CC"),
        said("??", equal=True),
        said("A?"),
        said("?B"),
    ]
    found = numbers(compared, HOW)
    # Read: seven. Worth 1 + 1 + 0 + 4 halves.
    assert (found["questions"], found["equal"], found["unreadable"]) == (7, 1, 2)
    assert (found["won"], found["lost"]) == (2, 1)
    assert found["win_rate"] == pytest.approx(4 / 7)
    # Asked and read: six, of which AA and AC changed with the order.
    assert found["disagreement"] == pytest.approx(2 / 6)
    # Verdicts that name a winner: AB, AB, BA, AA, A: the first in 1/2, 1/2, 1/2, 1, 1.
    assert found["first_place"] == pytest.approx(3.5 / 5)
    # Both prefer one in the first three; the judge agrees in the first and the third. Gold has no preference there.
    assert (found["agreement"]["judge"]["questions"], found["agreement"]["judge"]["share"]) == (3, pytest.approx(2 / 3))
    assert (found["agreement"]["gold"]["questions"], found["agreement"]["gold"]["share"]) == (2, 1.0)
    assert list(found["agreement"]) == ["judge", "gold"]


def test_at_equal_lengths_a_taste_for_length_is_no_win() -> None:
    # 20 longer answers that win, 5 shorter ones that lose: 80% of wins, all of them of length.
    compared = [said("AB", longer=50)] * 20 + [said("BA", longer=-50)] * 5
    found = numbers(compared, HOW)
    assert found["win_rate"] == pytest.approx(0.8)
    assert abs(found["win_rate_length_controlled"] - 0.5) < 0.15
    assert numbers([said("AB", longer=50)] * 20, HOW)["win_rate_length_controlled"] is None


@pytest.mark.parametrize("compared", [[], [said("AB")], [said("??")] * 3])
def test_of_too_few_nothing_is_said(compared: list[Compared]) -> None:
    found = numbers(compared, HOW)
    assert {found[name] for name in ("win_rate", "win_rate_low", "disagreement", "first_place")} == {None}
    assert found["agreement"] == {}
