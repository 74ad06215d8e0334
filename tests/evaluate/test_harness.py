"""What the harness asks is answered as reading each request alone would, and as the harness itself cuts texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from stackllama.errors import DataError, ModelError
from stackllama.evaluate.harness import Asked, HarnessModel, pack_asked, stopped, windows
from stackllama.model.roles import REFERENCE
from stackllama.rollout.experience import POLICY
from stackllama.tokens.tokenizer import Tokenizer
from tests.assembled import CONTEXT, assembled_run
from tests.evaluate.test_exam import TOKENIZER, make_trunk

QUESTION = "Which is it? It is"
OPTIONS = (" 1", " 2, or 3.", " it", " What?")


@cache
def model(role: str = POLICY, *, row_tokens: int = 256) -> HarnessModel:
    return HarnessModel(make_trunk(moved=0.5), role, TOKENIZER, row_tokens=row_tokens)


def short_model(*, row_tokens: int = 256) -> HarnessModel:
    """A model with a context of 64 tokens."""
    run = assembled_run()
    return HarnessModel(run.trunk, REFERENCE, run.tokenizer, row_tokens=row_tokens)


def logits_of(reader: HarnessModel, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (T, V) by the model of transformers itself, with another attention and no packing."""
    trunk = reader._trunk
    with trunk.use(reader._role):
        trunk.model.set_attn_implementation("eager")
        try:
            logits: torch.Tensor = trunk.model(input_ids=torch.tensor([ids])).logits[0]
        finally:
            trunk.model.set_attn_implementation("forest")
    return torch.log_softmax(logits.double(), -1)


def by_hand(reader: HarnessModel, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Reads one request alone; what is read is the last so many tokens of the model's context."""
    whole = [*context, *continuation][-(reader.context + 1) :]
    logprob_TV = logits_of(reader, whole[:-1])[-len(continuation) :]
    total = sum(float(logprob_TV[at, token]) for at, token in enumerate(continuation))
    return total, logprob_TV.argmax(-1).tolist() == list(continuation)


@pytest.mark.parametrize("role", [REFERENCE, POLICY])
@pytest.mark.parametrize("row_tokens", [256, 16])
def test_options_in_one_tree_are_as_likely_as_each_alone(role: str, row_tokens: int) -> None:
    reader = model(role, row_tokens=row_tokens)
    requests = [(question, option) for question in (QUESTION, "It is", "") for option in OPTIONS]
    for (context, option), (logprob, greedy) in zip(requests, reader.loglikelihood(requests), strict=True):
        before = [TOKENIZER.bos_id, *TOKENIZER.encode(context)]
        expected, likeliest = by_hand(reader, [one for one in before if one is not None], TOKENIZER.encode(option))
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == likeliest


def test_roles_differ_and_requests_come_back_in_their_order() -> None:
    requests = [(QUESTION, option) for option in (*OPTIONS, *reversed(OPTIONS))]
    policy, sft = (model(role).loglikelihood(requests) for role in (POLICY, REFERENCE))
    assert policy[:4] == policy[:3:-1]
    assert len({logprob for logprob, _ in policy}) == 4
    assert policy != sft


def test_a_context_is_read_once_and_a_last_token_never() -> None:
    pairs = [((1, 2, 3), (4,)), ((1, 2, 3), (5, 6)), ((7,), (8,)), ((1, 2, 3), (4,))]
    (row,) = pack_asked(pairs, 100)
    assert sorted(row, key=len) == [Asked((7,), ((8,),)), Asked((1, 2, 3), ((4,), (5, 6)))]
    assert sorted(map(len, row)) == [1, 4]  # 7; 1 2 3 and 5
    assert [one.tree.branches for one in row] == [((5,),), ()]


@pytest.mark.parametrize("row_tokens", [1, 5, 8, 100])
def test_options_that_outgrow_a_row_repeat_their_context(row_tokens: int) -> None:
    pairs = [((1, 2, 3), (4, at, 9)) for at in range(6)]
    rows = pack_asked(pairs, row_tokens)
    assert sorted(c for row in rows for one in row for c in one.continuations) == [(4, at, 9) for at in range(6)]
    assert max(sum(map(len, row)) for row in rows) <= max(row_tokens, 5)  # a pair alone: three tokens and two
    assert pack_asked([], row_tokens) == []


def test_what_greedy_decoding_writes_is_greedy_and_nothing_else() -> None:
    reader = model()
    for how in ({"max_gen_toks": 6}, {"max_gen_toks": 6, "temperature": 0.7, "do_sample": False}):
        (text,) = reader.generate_until([(QUESTION, how)])
        ids = [TOKENIZER.bos_id or 0, *TOKENIZER.encode(QUESTION)]
        likely: list[int] = []
        for _ in range(6):
            likely.append(int(logits_of(reader, [*ids, *likely])[-1].argmax()))
        likely = likely[: likely.index(TOKENIZER.eos_id)] if TOKENIZER.eos_id in likely else likely
        assert text == TOKENIZER.decode(likely)
    found = reader._scored([(tuple(ids), (token,)) for token in range(TOKENIZER.vocab_size)])
    assert [token for token, one in enumerate(found) if one.greedy] == likely[:1]
    assert math.fsum(math.exp(one.logprob) for one in found) == pytest.approx(1.0, abs=1e-5)


def test_spaces_at_the_end_of_a_context_go_to_the_continuation() -> None:
    reader = model()
    context, continuation = reader.encode_pair("It is ", "2")
    assert context == (TOKENIZER.bos_id, *TOKENIZER.encode("It is"))
    assert continuation == tuple(TOKENIZER.encode(" 2"))
    assert reader.encode_pair(" \n", "2") == ((TOKENIZER.bos_id,), tuple(TOKENIZER.encode(" \n2")))
    assert reader.loglikelihood([("It is ", "2")]) == reader.loglikelihood([("It is", " 2")])


def test_a_model_without_bos_is_given_eos_for_a_context_of_no_text() -> None:
    bare = Tokenizer.wrap(TOKENIZER.rust, bos=None, eos="<|endoftext|>")
    reader = HarnessModel(make_trunk(moved=0.5), POLICY, bare, row_tokens=64)
    assert reader.encode_pair("", "It") == ((bare.eos_id,), tuple(bare.encode("It")))
    assert reader.encode_pair("It", " is")[0] == tuple(bare.encode("It"))


def test_long_contexts_are_cut_from_the_left_to_what_can_be_read() -> None:
    reader = short_model()
    context, option = "what is a hop? " * 20 + "a", " plant, a plant"
    ids = reader.encode_pair(context, option)
    assert len(ids[0]) > CONTEXT
    (found,) = reader.loglikelihood([(context, option)])
    assert found[0] == pytest.approx(by_hand(reader, *ids)[0], abs=1e-4)


def test_what_cannot_be_scored_is_refused() -> None:
    reader = short_model()
    with pytest.raises(ModelError, match=r"a continuation of \d+ tokens, but the model has a context of 64"):
        reader.loglikelihood([("a", " hop" * 200)])
    with pytest.raises(ModelError, match="no token of its own"):
        reader.loglikelihood([("a", "")])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 9, 10, 12, 13])
def test_windows_predict_each_token_once_with_as_much_before_it_as_can_be_read(length: int) -> None:
    tokens = tuple(range(length))
    found = list(windows(tokens, prefix=-1, context=4))
    assert [token for _, continuation in found for token in continuation] == list(tokens)
    for number, (context, continuation) in enumerate(found):
        read = (*context, *continuation[:-1])
        assert len(read) == (min(4, length) if number == 0 else 4)
        assert read == tuple(range(continuation[-1] - len(read), continuation[-1]))  # -1, the prefix, is before 0


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 9, 10, 12, 13])
@pytest.mark.filterwarnings("ignore")
def test_windows_are_those_of_the_harness(length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(length))
    theirs = [utils.make_disjoint_window(one) for one in utils.get_rolling_token_windows(tokens, -1, 4, 1)]
    ours = windows(tuple(tokens), prefix=-1, context=4)
    assert [(list(context), list(continuation)) for context, continuation in ours] == theirs


def test_a_whole_document_is_the_sum_of_its_windows() -> None:
    reader = short_model()
    texts = ["a plant", "", "what is a hop? a plant " * 20]
    found = reader.loglikelihood_rolling(texts)
    assert found[1] == 0.0
    for text, logprob in zip(texts, found, strict=True):
        pairs = list(windows(tuple(reader._tokenizer.encode(text)), prefix=reader.prefix, context=CONTEXT))
        assert logprob == pytest.approx(sum(by_hand(reader, *pair)[0] for pair in pairs), rel=1e-5)
    assert len(pairs) > 2


def test_texts_end_at_the_first_stop_string() -> None:
    assert stopped("a b. c! d", ["!", ".", ""]) == "a b"
    assert stopped("a b", "b") == "a "
    assert stopped("a b", None) == "a b"
    reader = model()
    (whole,) = reader.generate_until([(QUESTION, {"max_gen_toks": 12})])
    assert len(whole) > 3
    assert reader.generate_until([(QUESTION, {"max_gen_toks": 12, "until": [whole[2]]})]) == [
        whole[: whole.index(whole[2])]
    ]


def test_samples_are_drawn_where_a_task_asks_for_them_with_equal_noise() -> None:
    how = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.0}
    first = model().generate_until([(QUESTION, how), (QUESTION, how), (QUESTION, {"max_gen_toks": 3})])
    assert first[0] != first[1]
    assert model().generate_until([(QUESTION, how)]) == first[:1]


def test_a_way_to_generate_that_there_is_not_is_named() -> None:
    for how, kind, message in (
        ({"top_k": 4}, DataError, "a task generates text with top_k, which the sampler does not have"),
        ({"max_gen_toks": 64}, ModelError, "texts of up to 64 tokens, but the model has a context of 64"),
        ({}, ModelError, "texts of up to 256 tokens"),
    ):
        with pytest.raises(kind, match=message):
            short_model().generate_until([("a", how)])
    assert len(short_model().generate_until([("a hop " * 100, {"max_gen_toks": 2, "top_k": None})])) == 1
