"""Equal KL: between two evaluations by a straight line, the last time that the training was there, never beyond."""

from __future__ import annotations

import pytest

from stackllama.report.equal_kl import at_kl, last, most
from stackllama.report.figures import Log

LOG: Log = {
    "kl": ((0.0, 0.0), (40.0, 2.0), (80.0, 4.0), (120.0, 3.0)),
    "judge": ((0.0, 1.0), (40.0, 2.0), (80.0, 2.4), (120.0, 3.0)),
    "judge_low": ((0.0, 0.5), (40.0, 1.6), (80.0, 1.4), (120.0, 2.0)),
    "judge_high": ((0.0, 1.5), (40.0, 2.4), (80.0, 3.4), (120.0, 4.0)),
    "judge_gain": ((0.0, 0.0), (40.0, 0.8), (80.0, 1.0), (120.0, 1.2)),
}


def test_between_evaluations_by_a_straight_line() -> None:
    found = at_kl(LOG, 1.5)  # three quarters of the way from step 0 to step 40
    assert found is not None
    assert found.step == pytest.approx(30)
    assert found.numbers == pytest.approx({"judge": 1.75, "judge_low": 1.325, "judge_high": 2.175, "judge_gain": 0.6})


def test_where_kl_came_back_the_last_time_counts() -> None:
    found = at_kl(LOG, 3.5)  # passed through on the way up, between 40 and 80, and again half way down to 120
    assert found is not None
    assert found.step == pytest.approx(100)
    assert found.numbers["judge"] == pytest.approx(2.7)


def test_at_the_final_kl_it_is_the_final_evaluation() -> None:
    assert last(LOG) == 3.0
    found = at_kl(LOG, 3.0)
    assert found is not None
    assert (found.step, found.numbers["judge"]) == (120.0, 3.0)


def test_nothing_is_extrapolated() -> None:
    assert most(LOG) == 4.0
    assert at_kl(LOG, 4.01) is None
    assert at_kl({}, 1.0) is None
    assert (most({}), last({})) == (None, None)
    assert at_kl({"kl": ((0.0, 1.0),)}, 2.0) is None
