from __future__ import annotations

from tests.data.small_store import FIRST, LONELY

from stackllama.data.store.picking import Picked
from stackllama.report.question import lines, marks


def test_a_question_with_its_answers_and_pairs() -> None:
    text = "\n".join(lines(Picked(FIRST, "sft")))
    assert text.startswith(
        "First\n\nquestion 1 of a.test: votes 5, 2010-03-01\nby Ada (https://a.test/users/1), CC BY-SA 2.5\n"
    )
    assert "\nhttps://a.test/q/1\ntags: x, y\nsplit sft, cluster a.test/1, weight 2\n\nSee [here]" in text
    assert "\n--- 1. answer 11: votes 3, accepted, 2010-03-02\n" in text
    assert "\n--- 2. answer 12: votes -2, 2010-03-03\n" in text
    assert "\nhttps://a.test/a/12\n\ncosts $5 or $6\n" in text
    assert text.endswith("--- pairs, better > worse: 2\n  1 > 2   score gap 3, margin 1.5\n  3 > 2   score gap 1")


def test_a_question_of_which_little_is_known() -> None:
    text = "\n".join(lines(Picked(LONELY, "eval")))
    assert "question 1 of b.test: votes 0, no date\n" in text
    assert "\nno address\ntags: none\n" in text
    assert text.endswith("--- pairs, better > worse: none")


def test_marks() -> None:
    assert list(marks(FIRST, 0)) == ["better than 2 (score gap 3, margin 1.5)"]
    assert list(marks(FIRST, 1)) == ["worse than 1 (score gap 3, margin 1.5)", "worse than 3 (score gap 1)"]
