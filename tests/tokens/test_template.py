from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stackllama.tokens.template import (
    decode_answer,
    encode_behind_root,
    encode_branch,
    encode_document,
    encode_root,
    question_text,
    root_text,
)
from stackllama.tokens.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer.train(["Question: Why?\n\nAnswer: the hops, 42 of them. Answer: because"] * 9, 320)
QUESTIONS = ["How do I read a file?", "x =  42", "你好?", "Ends in code:\n\n    print(1)\n", "a\n\nAnswer: b"]
ANSWERS = [
    "Use `open`.",
    "the yeast",
    "42000 times",
    "7",
    "```python\nprint(1)\n```",
    "`x`",
    "(yes)",
    ": :",
    '"No."',
    "你好,世界。",
    "🍺 cheers 👩‍👩‍👧",
    "naïve café",
    "$x^2$ and \\frac{1}{2}",
    "> quoted\n\nthen",
    "- list\n- of things",
    "</s> <|im_end|>",
    "▁",
    "\u200b",
]
# Not stripped: what stands behind the colon may begin with anything, as sampled text does.
RAW = ["\n", "\nnewline first", " \n\n  code()", "   three spaces", "\t", " \r\nx", " ", "  "]


def test_the_wording_is_that_of_stackllama() -> None:
    assert root_text(" Why? \n") == "Question: Why?\n\nAnswer:"
    assert question_text(" Title ", "\nBody\n") == "Title\n\nBody"
    assert question_text("", "Body") == "Body"
    assert question_text("Title", " ") == "Title"


@pytest.mark.parametrize("answer", ANSWERS)
def test_root_and_branch_are_the_whole(any_tokenizer: Tokenizer, answer: str) -> None:
    for question in QUESTIONS:
        root, branch = encode_root(any_tokenizer, question), encode_branch(any_tokenizer, answer)
        assert root[0] == any_tokenizer.bos_id
        assert branch[-1] == any_tokenizer.eos_id
        assert root[1:] + branch[:-1] == any_tokenizer.encode(f"Question: {question.strip()}\n\nAnswer: {answer}")
        assert any_tokenizer.control_ids.isdisjoint(root[1:] + branch[:-1])


@pytest.mark.parametrize("text", RAW)
def test_unstripped_text_behind_the_colon_is_whole_too(any_tokenizer: Tokenizer, text: str) -> None:
    root = any_tokenizer.encode(root_text("Why?"))
    assert root + encode_behind_root(any_tokenizer, text) == any_tokenizer.encode(root_text("Why?") + text)


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_comes_back(any_tokenizer: Tokenizer, answer: str) -> None:
    # "▁" is SentencePiece's own sign for a space, so it cannot tell the two apart.
    if answer != "▁" or any_tokenizer.rust.token_to_id("<s>") is None:
        assert decode_answer(any_tokenizer, encode_branch(any_tokenizer, answer)) == answer


@given(st.text(), st.text())
@example("\nan indented\n\n    block\n", " ")
@example("", "\x1c")
@settings(max_examples=300)
def test_byte_level_branches_are_whole_and_invertible(question: str, answer: str) -> None:
    branch = encode_branch(BYTE_LEVEL, answer)
    assert decode_answer(BYTE_LEVEL, branch) == answer.strip()
    assert BYTE_LEVEL.control_ids.isdisjoint(branch[:-1])
    if answer.strip():
        whole = BYTE_LEVEL.encode(f"Question: {question.strip()}\n\nAnswer: {answer.strip()}")
        assert encode_root(BYTE_LEVEL, question) + branch == [BYTE_LEVEL.bos_id, *whole, BYTE_LEVEL.eos_id]


def test_answers_are_stripped(any_tokenizer: Tokenizer) -> None:
    assert encode_branch(any_tokenizer, "\n  the yeast \n") == encode_branch(any_tokenizer, "the yeast")


def test_an_empty_answer_is_an_end_alone(any_tokenizer: Tokenizer) -> None:
    assert encode_branch(any_tokenizer, " \n") == [any_tokenizer.eos_id]
    assert decode_answer(any_tokenizer, [any_tokenizer.eos_id]) == ""
    assert decode_answer(any_tokenizer, []) == ""


def test_what_follows_the_end_is_not_the_answer(any_tokenizer: Tokenizer) -> None:
    branch = encode_branch(any_tokenizer, "the yeast")
    assert decode_answer(any_tokenizer, branch + branch) == "the yeast"
    assert decode_answer(any_tokenizer, branch[:-1]) == "the yeast"  # cut off before its end
    assert [token for token in branch if token == any_tokenizer.eos_id] == branch[-1:]


def test_a_document_stands_between_bos_and_eos(any_tokenizer: Tokenizer) -> None:
    text = "The hops, 42 of them."
    ids = [any_tokenizer.bos_id, *any_tokenizer.encode(text), any_tokenizer.eos_id]
    assert encode_document(any_tokenizer, text) == ids


def test_a_model_without_bos_gets_none() -> None:
    bare = Tokenizer.wrap(BYTE_LEVEL.rust, bos=None, eos="<|endoftext|>")
    assert encode_root(bare, "Why?") == bare.encode("Question: Why?\n\nAnswer:")
    assert encode_document(bare, "Why?") == [*bare.encode("Why?"), bare.eos_id]


def test_where_a_token_spans_the_border_the_text_is_still_right(across_words: Tokenizer) -> None:
    root = across_words.encode(root_text("Why?"))
    spanned = 0
    for answer in ANSWERS[:-2]:
        branch = encode_branch(across_words, answer)[:-1]
        assert across_words.decode(root + branch) == f"Question: Why?\n\nAnswer: {answer}"
        spanned += root + branch != across_words.encode(f"Question: Why?\n\nAnswer: {answer}")
    assert spanned > 0  # the case does occur here
