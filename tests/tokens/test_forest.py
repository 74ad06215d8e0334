"""The packed forest: layout, positions and targets, worked by hand for the row drawn in the module's docstring."""

from __future__ import annotations

import pytest

from stackllama.tokens.forest import Tree, branch_targets, last_tokens, plant, root_targets

DRAWN = [Tree((10, 11), ((20, 21), (30, 31)), key=7), Tree((40, 41, 42), (), key=8)]


def test_row_is_laid_out_as_drawn() -> None:
    forest = plant(DRAWN)
    assert forest.tokens_T.tolist() == [10, 11, 20, 21, 30, 31, 40, 41, 42]
    assert forest.positions_T.tolist() == [0, 1, 2, 3, 2, 3, 0, 1, 2]
    ends = [(s.start, s.stop, s.root_start, s.root_stop) for s in forest.segments]
    assert ends == [(0, 2, 0, 2), (2, 4, 0, 2), (4, 6, 0, 2), (6, 9, 6, 9)]
    assert forest.tree_of_branch == (7, 7)


def test_branch_targets_are_predicted_by_the_root_first() -> None:
    targets = branch_targets(plant(DRAWN))
    # a0 is predicted by q1 (place 1), a1 by a0 (place 2); b0 by q1 again, b1 by b0 (place 4).
    assert targets.predictor_N.tolist() == [1, 2, 1, 4]
    assert targets.label_N.tolist() == [20, 21, 30, 31]
    assert targets.branch_N.tolist() == [0, 0, 1, 1]


def test_root_targets_leave_out_each_roots_first_token() -> None:
    targets = root_targets(plant(DRAWN))
    assert targets.predictor_N.tolist() == [0, 6, 7]
    assert targets.label_N.tolist() == [11, 41, 42]


def test_scores_are_read_at_each_branchs_last_token() -> None:
    assert last_tokens(plant(DRAWN)).tolist() == [3, 5]


def test_length_of_a_tree_counts_its_root_once() -> None:
    assert len(DRAWN[0]) == 6


@pytest.mark.parametrize("trees", [[], [Tree((), ((1,),))], [Tree((1,), ((), (2,)))]])
def test_empty_forests_roots_and_branches_are_refused(trees: list[Tree]) -> None:
    with pytest.raises(ValueError, match=r"at least one|empty"):
        plant(trees)
