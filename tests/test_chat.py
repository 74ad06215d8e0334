"""The chat answers what it can, and says in a line what it cannot."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from stackllama import chat as chat_module
from stackllama.chat import chat
from stackllama.errors import DataError, ModelError, RecipeError, StackllamaError
from stackllama.tokens.template import encode_root
from tests.assembled import CONTEXT, assembled_run, speak_from

Capture = pytest.CaptureFixture[str]


class Typed(io.TextIOWrapper):
    """Standard input with these bytes, at a terminal or not."""

    def __init__(self, content: bytes, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    speak_from(chat_module, tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize(
    ("question", "new", "kind", "message"),
    [
        ("", 4, DataError, "the question is empty"),
        ("a\udcffb", 4, DataError, "the question is not valid Unicode from character 2 on"),
        ("q " * 100, 4, ModelError, "a context of 64"),
        ("q", 2_000_000, ModelError, "an answer of 2000000 tokens"),
        ("q", 9 * 10**18, ModelError, "a context of 64"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_clear_error(
    run: Path, question: str, new: int, kind: type[StackllamaError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        chat(run, stage="sft", question=question, max_new_tokens=new)
    assert caught.value.exit_code == 2


def test_the_policy_is_the_run_s_own_and_another_stage_is_refused(run: Path) -> None:
    chat(run, question="q", max_new_tokens=2, stage="sft")
    with pytest.raises(RecipeError, match="has no stage dpo; allowed: ppo, sft"):
        chat(run, question="q", stage="dpo")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace("policy: ppo", "policy: dpo"), "utf-8")
    with pytest.raises(RecipeError, match="has no stage ppo; allowed: dpo, sft"):
        chat(run, question="q", stage="ppo")


def test_the_context_is_used_to_its_last_token(run: Path) -> None:
    room = CONTEXT - len(encode_root(assembled_run().tokenizer, "q"))
    chat(run, stage="sft", question="q", max_new_tokens=room)
    with pytest.raises(ModelError, match="are 65 together"):
        chat(run, stage="sft", question="q", max_new_tokens=room + 1)


def test_at_a_terminal_the_next_question_is_asked_for(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [b"a\xffb", b"q " * 100, b"what is a hop?", b""]
    monkeypatch.setattr(sys, "stdin", Typed(b"\n".join(lines) + b"\n", terminal=True))
    chat(run, stage="sft", max_new_tokens=4)
    shown = capsys.readouterr()
    assert shown.out.count("question> ") == 4
    assert shown.err.count("error: ") == 2
    assert "not valid Unicode" in shown.err
    assert "a context of 64" in shown.err


def test_a_pipe_ends_with_the_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Typed(b"what?\na\xffb\n", terminal=False))
    with pytest.raises(DataError, match="not valid Unicode"):
        chat(run, stage="sft", max_new_tokens=4)
