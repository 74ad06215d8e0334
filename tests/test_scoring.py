"""The scorer says what is wrong with a text before it spends time on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackllama import scoring
from stackllama.errors import DataError, ModelError
from stackllama.scoring import score
from stackllama.tokens.template import encode_branch, encode_root
from tests.assembled import CONTEXT, assembled_run, speak_from


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    speak_from(scoring, tmp_path, monkeypatch)
    return tmp_path


def test_a_reward_for_each_answer_whatever_stands_beside_it(run: Path) -> None:
    both = score(run, "what is a hop?", ["a plant", "a jump"])
    assert both == pytest.approx([score(run, "what is a hop?", [one])[0] for one in ("a plant", "a jump")], abs=1e-5)
    assert both[0] != both[1]


@pytest.mark.parametrize(
    ("question", "answers", "message"),
    [
        ("", ["a"], "the question is empty"),
        ("q", ["a", " \n"], "the answer is empty"),
        ("q", [], "at least one"),
        ("a\udcffb", ["a"], "the question is not valid Unicode from character 2 on"),
        ("q", ["a", "\udcff"], "the answer is not valid Unicode from character 1 on"),
    ],
)
def test_texts_that_cannot_be_read_are_named(tmp_path: Path, question: str, answers: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(tmp_path, question, answers)  # there is no run: the text is looked at first


def test_the_context_bounds_a_question_with_one_answer_and_not_with_all(run: Path) -> None:
    tokenizer = assembled_run().tokenizer
    room = CONTEXT - len(encode_root(tokenizer, "q")) - len(encode_branch(tokenizer, "4"))
    answer = "4" * (room + 1)  # digits are tokens one by one
    assert len(score(run, "q", [answer, answer])) == 2
    with pytest.raises(ModelError, match=r"are 65 together, but the model has a context of 64"):
        score(run, "q", ["4", answer + "4"])
