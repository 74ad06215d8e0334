"""Changes to answers, and what is read from scores before and after, by hand."""

from __future__ import annotations

import pytest

from stackllama.evaluate.preference import JudgedPair
from stackllama.evaluate.sensitivity import cut_to_half, markdown_noise, react, without_end
from stackllama.evaluate.statistics import Resampling
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import PairedTree

HOW: Resampling = {"resamples": 500, "confidence": 0.95, "seed": 0}
EOS = 2
TREE = PairedTree(
    Tree((5, 6), ((7, 8, 9, 10, 11, 2), (12, 2), (2,)), 4), ((0, 1), (0, 2)), (0.0, 0.0), (0, 1, 2), 0.5, 1.0
)


def test_answers_are_cut_to_half_with_their_end_and_pairs_stay() -> None:
    cut = cut_to_half(TREE, EOS)
    assert cut.tree.branches == ((7, 8, 9, 2), (12, 2), (2,))
    assert (cut.pairs, cut.answers, cut.tree.key, cut.tree.root) == (TREE.pairs, TREE.answers, 4, (5, 6))


def test_answers_lose_their_end_unless_they_are_nothing_else() -> None:
    assert without_end(TREE, EOS).tree.branches == ((7, 8, 9, 10, 11), (12,), (2,))


def test_noise_changes_no_word() -> None:
    noisy = markdown_noise("Use soil.\n\n- über list\nlast 1")
    assert noisy == "**Use** soil.\n\n- über list\n**last** 1\n\n---"
    assert markdown_noise("  `code` first ") == "`code` first\n\n---"


def test_noise_changes_no_code_and_no_list() -> None:
    code = "```python\nimport os\nx_y = 1\n```\n1. one\n    indented = 2"
    assert markdown_noise(f"Try\n{code}\nthen") == f"**Try**\n{code}\n**then**\n\n---"


def test_a_reaction_worked_by_hand() -> None:
    before = [JudgedPair(0, 0, 1, 3.0, 1.0), JudgedPair(1, 0, 1, 1.0, 3.0), JudgedPair(1, 2, 1, 1.0, 3.0)]
    after = [JudgedPair(0, 0, 1, 4.0, 2.0), JudgedPair(1, 0, 1, 4.0, 3.0), JudgedPair(1, 2, 1, 3.0, 3.0)]
    found = react(before, after, HOW)
    assert found is not None
    # All six scores are 1 or 3, as many of each: a deviation of 1. Shifts by question: 1, and the mean of 1.5 and 1.
    assert found.shift.mean == pytest.approx((1 + 1.25) / 2)
    # Question 0 keeps its order; of question 1 one pair turns over, and one becomes a tie, which counts half.
    assert found.kept.mean == pytest.approx((1 + 0.25) / 2)
    assert found.accuracy.mean == pytest.approx((0 + 0.75) / 2)
    assert (found.questions, found.pairs) == (2, 3)


def test_pairs_that_are_lost_are_left_out_and_one_question_is_too_few() -> None:
    before = [JudgedPair(0, 0, 1, 3.0, 1.0), JudgedPair(1, 0, 1, 1.0, 3.0)]
    assert react(before, before[:1], HOW) is None
    again = react(before, before, HOW)
    assert again is not None
    assert (again.shift.mean, again.kept.mean, again.accuracy.mean) == (0, 1, 0)


def test_equal_scores_have_no_deviation_to_measure_by() -> None:
    same = [JudgedPair(0, 0, 1, 1.0, 1.0), JudgedPair(1, 0, 1, 1.0, 1.0)]
    assert react(same, [JudgedPair(0, 0, 1, 2.0, 1.0), *same[1:]], HOW) is None
