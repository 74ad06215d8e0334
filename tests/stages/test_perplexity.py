"""Which held-out answers a perplexity is taken over."""

from __future__ import annotations

from stackllama.stages.perplexity import first_answers
from stackllama.tokens.forest import Tree


def test_a_perplexity_is_taken_over_two_questions_at_least() -> None:
    trees = [
        Tree((5,), ((6, 2), (7, 2), (8, 2)), 0),
        Tree((5,), ((9, 2),), 0),
        Tree((5,), ((6, 2),), 1),
        Tree((5,), (), 2),
    ]
    # The first question alone has the answers that were asked for, in two trees; an interval needs another question.
    assert [tree.key for tree in first_answers(trees, 2)] == [0, 0, 1]
    assert [tree.key for tree in first_answers(trees[2:], 1)] == [1, 2]
