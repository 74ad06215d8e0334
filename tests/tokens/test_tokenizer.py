from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from stackllama.errors import ModelError
from stackllama.tokens.tokenizer import Tokenizer

TEXTS = ["abc def 2024 abc abc def", "the hops and the malt, the water and the yeast"] * 5
BYTE_LEVEL = Tokenizer.train(TEXTS, 300)
CONTROL_TEXT = ["<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|pad|>", "<|startoftext|>", "<unk>", "<0x0A>"]


@pytest.mark.parametrize("text", CONTROL_TEXT)
def test_control_text_in_a_post_never_becomes_a_control_id(any_tokenizer: Tokenizer, text: str) -> None:
    for post in (text, f"see{text}here", f"\n{text}\n{text}", f"`{text}`"):
        ids = any_tokenizer.encode(post)
        assert any_tokenizer.control_ids.isdisjoint(ids)
        assert any_tokenizer.decode(ids).strip() == post.strip()
        assert any_tokenizer.encode_batch([post, "x"])[0] == ids


@given(st.text())
@settings(max_examples=200)
def test_byte_level_gives_every_text_back_and_no_control_id(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode(ids) == text
    assert BYTE_LEVEL.control_ids.isdisjoint(ids)


def test_encode_adds_neither_bos_nor_eos(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("") == []
    assert not {any_tokenizer.bos_id, any_tokenizer.eos_id} & set(any_tokenizer.encode("the yeast"))


def test_digits_are_tokens_of_their_own(trained: Tokenizer) -> None:
    # "42" and "1000" are frequent in the texts that it was trained on.
    assert [trained.rust.id_to_token(number) for number in trained.encode("x =  421000")][-6:] == list("421000")


def test_training_is_reproducible_and_bounded() -> None:
    one, two = Tokenizer.train(TEXTS, 280), Tokenizer.train(iter(TEXTS), 280)
    assert one.fingerprint == two.fingerprint != BYTE_LEVEL.fingerprint
    assert one.vocab_size == 280
    assert {one.eos_id, one.bos_id, one.pad_id} == set(one.control_ids) == {0, 1, 2}


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match=r"258.*259 or more"):
        Tokenizer.train(TEXTS, 258)
    assert Tokenizer.train(TEXTS, 259).vocab_size == 259


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_reads_the_saved_files_as_the_same_tokenizer(
    any_tokenizer: Tokenizer, with_config: bool, tmp_path: Path
) -> None:
    any_tokenizer.save(tmp_path, context=512)
    if with_config:  # the model's type must not make transformers choose another class of tokenizer
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the yeast", "  two  spaces ", "\nfor i in range(10):", "42000 你好 🍺", "He said: (no)"):
        ids = any_tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs(text).input_ids == [any_tokenizer.bos_id, *ids]
        assert theirs("</s>", split_special_tokens=True, add_special_tokens=False).input_ids == any_tokenizer.encode(
            "</s>"
        )
        assert theirs.decode(ids) == any_tokenizer.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (any_tokenizer.bos_id, any_tokenizer.eos_id)
    assert theirs.model_max_length == 512
    assert len(theirs) == any_tokenizer.vocab_size


def test_saved_and_loaded_is_the_same(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    any_tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == any_tokenizer.fingerprint
    assert loaded.control_ids == any_tokenizer.control_ids
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (
        any_tokenizer.bos_id,
        any_tokenizer.eos_id,
        any_tokenizer.pad_id,
    )
    assert loaded.encode("see </s> 你好\n\n x") == any_tokenizer.encode("see </s> 你好\n\n x")


def test_truncation_and_padding_left_in_a_file_are_ignored(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rust.enable_truncation(3)
    rust.enable_padding(length=8)
    rust.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("a b c d e f") == trained.encode("a b c d e f")
    assert loaded.encode("a") == trained.encode("a")


def _folder(tmp_path: Path, **files: object) -> Path:
    rust = RustTokenizer(models.WordLevel({"a": 0, "<e>": 1, "<b>": 2, "<p>": 3}, unk_token="a"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.add_special_tokens(["<e>", "<b>", "<p>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_the_tokenizers_own_files_go_before_the_models(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "<e>", "special": True}, "bos_token": "<b>", "add_bos_token": True},
        generation_config={"eos_token_id": 3},
        config={"eos_token_id": 2, "pad_token_id": 3},
    )
    loaded = Tokenizer.load(folder)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (1, 2, 3)


def test_ids_of_the_model_serve_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    loaded = Tokenizer.load(_folder(tmp_path, generation_config={"eos_token_id": [3, 1]}, config={"eos_token_id": 2}))
    assert loaded.eos_id == 3


@pytest.mark.parametrize("add_bos_token", [False, None])
def test_a_bos_that_the_model_never_saw_is_not_used(tmp_path: Path, add_bos_token: bool | None) -> None:
    config = {"eos_token": "<e>", "bos_token": "<b>", "add_bos_token": add_bos_token}
    assert Tokenizer.load(_folder(tmp_path, tokenizer_config=config)).bos_id is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "names no EOS token"),
        ({"tokenizer_config": {"eos_token": "<nowhere>"}}, "eos token is '<nowhere>'"),
        ({"tokenizer_config": [1]}, "holds list"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, files: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(_folder(tmp_path, **files))


def test_missing_and_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_an_unknown_character_is_not_an_end_of_text() -> None:
    # A byte-level vocabulary that lacks some bytes and names its EOS as the unknown token, as SmolLM2's does.
    rust = RustTokenizer(models.BPE(vocab={"<e>": 0, "a": 1, "b": 2}, merges=[], unk_token="<e>"))
    rust.add_special_tokens(["<e>"])
    assert Tokenizer.wrap(rust, bos=None, eos="<e>").encode("a\x04b") == [1, 2]


def test_a_unigram_vocabulary_does_not_find_its_control_pieces_in_text() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "</s>a b")]
    rust = RustTokenizer(models.Unigram(pieces, unk_id=0))
    rust.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer.wrap(rust, bos=None, eos="</s>")
    ids = tokenizer.encode("a </s> b")
    assert tokenizer.control_ids == {1}
    assert 1 not in ids
    assert len(ids) == len("a </s> b")
    assert tokenizer.encode("aüb")[1] == 0  # the unknown token stands for text


def test_a_tokenizer_that_reads_control_text_as_control_is_refused() -> None:
    rust = RustTokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.add_special_tokens(["</s>"])
    with pytest.raises(ModelError, match="'</s>' into a control token"):
        Tokenizer.wrap(rust, bos=None, eos="</s>")
