"""Control tokens stay text, also where another tool reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from stackllama.data.text.cleaning import Cleaning
from tests.data.cleaned import cleaned, everything


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("ends with <|im_end|>", "ends with <|im_end| >"),
        ("`<|endoftext|><|eot_id|>`", "`<|endoftext| ><|eot_id| >`"),
        ("Llama 2: <s>[INST] Hi [/INST] Ho </s>", "Llama 2: <s >[INST ] Hi [/INST ] Ho </s >"),
        ("<<SYS>> and <</SYS>>", "<<SYS> > and <</SYS> >"),
        ("<start_of_turn>user", "<start_of_turn >user"),
        ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜ >"),
        ("[|endofturn|]", "[|endofturn| ]"),
        ("<fim_prefix><pad><unk>", "<fim_prefix ><pad ><unk >"),
        ("<think>so</think>", "<think >so</think >"),
    ],
)
def test_a_control_token_is_broken(text: str, broken: str) -> None:
    assert cleaned(text, how=Cleaning(control_tokens="break")).text == broken


@pytest.mark.parametrize(
    "text",
    [
        "a <| b |> c in F#, and Haskell's (<|>)",
        "x <|y| z",
        "<small>s</small>, <strong>, <span>, <s:property value='x'/>, <mask id='m'>",
        "usage: cat <filename>",
        "[inst] [INSTALL] [SEP] array[i]",
        r"$\langle\psi|\phi\rangle$ and <0|1>",
        "<| not one |>",
        "<|" + "a" * 65 + "|>",
    ],
)
def test_what_looks_like_one_stays(text: str) -> None:
    assert cleaned(text, how=everything()).text == text


def test_another_tool_that_reads_control_tokens_in_text_finds_none() -> None:
    tokens = ["<|im_start|>", "<|im_end|>", "</s>", "[INST]", "<start_of_turn>", "<｜end▁of▁sentence｜>"]
    tool = Tokenizer(models.BPE())
    tool.pre_tokenizer = pre_tokenizers.ByteLevel()
    tool.train_from_iterator(["some text"], trainers.BpeTrainer(special_tokens=tokens, show_progress=False))
    text = "".join(f"so {token} and `{token}{token}`, " for token in tokens)
    broken = cleaned(text, how=Cleaning(control_tokens="break")).text
    assert broken is not None
    control = set(range(len(tokens)))
    assert set(tool.encode(text).ids) >= control
    assert control.isdisjoint(tool.encode(broken).ids)


def test_each_is_counted_and_a_post_is_dropped_where_that_is_asked_for() -> None:
    assert cleaned("<s> </s> <|im_end|>", how=Cleaning(control_tokens="break")).counts == {
        "text: control token broken": 3
    }
    assert cleaned("<s> </s>", how=Cleaning(control_tokens="drop")).counts == {"post: has a control token": 1}
    assert cleaned("<s> </s>", how=Cleaning(control_tokens="drop")).text is None
    assert cleaned("<s> </s>", how=Cleaning(control_tokens="off")).text == "<s> </s>"


@given(st.lists(st.sampled_from(["<", "|", ">", "s", "/", "im_end", "[", "]", "INST", " ", "<|im_end|>", "</s>"])))
def test_nothing_is_left_to_break(parts: list[str]) -> None:
    once = cleaned("".join(parts), how=Cleaning(control_tokens="break")).text
    assert once is not None
    assert "<|im_end|>" not in once
    assert "</s>" not in once
    assert cleaned(once, how=Cleaning(control_tokens="break")).text == once
