"""From questions to rows: limits, dealing of pairs, the order of training."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.errors import DataError
from stackllama.tokens.batches import StepResult
from stackllama.tokens.sources import (
    Encoded,
    PairedTree,
    encode_answers,
    encode_pairs,
    encode_prompts,
    plan_steps,
    reward_row,
    reward_source,
    sft_source,
)
from stackllama.tokens.tokenizer import Tokenizer

WHO = Attribution("https://example/q/1", "Ann", 1, None, "CC BY-SA 4.0")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a question about tea", "an answer about milk and honey"] * 20, 300)


def question(number: int, texts: list[str], pairs: list[tuple[int, int]], votes: list[int] | None = None) -> Question:
    answers = tuple(
        Answer(100 * number + at, text, (votes or [0] * len(texts))[at], False, "2020-01-01T00:00:00.000", WHO)
        for at, text in enumerate(texts)
    )
    chosen = tuple(Pair(better, worse, 1) for better, worse in pairs)
    return Question("example", number, "tea", "a question", (), 0, "2020-01-01", WHO, answers, chosen)


def pairs_of(
    tokenizer: Tokenizer, questions: list[Question], *, answers: int = 8, longest: int = 64, row: int = 512
) -> tuple[list[tuple[int, int, int]], dict[str, int]]:
    """(question, better, worse) of every pair that was encoded, and what was left out."""
    found = encode_pairs(
        tokenizer,
        questions,
        titles=True,
        answers_per_question=answers,
        max_question_tokens=64,
        max_answer_tokens=longest,
        row_tokens=row,
        by_pairs=False,
        seed=0,
    )
    kept = [(one.tree.key, one.answers[b], one.answers[w]) for one in found.items for b, w in one.pairs]
    assert all(len(one) <= row for one in found.items)
    return kept, dict(found.left_out)


def test_every_pair_is_encoded_once_even_when_a_tree_outgrows_its_row(tokenizer: Tokenizer) -> None:
    texts = [f"answer {at} " + "milk " * 8 for at in range(6)]
    wanted = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    kept, _ = pairs_of(tokenizer, [question(1, texts, wanted)], row=60)
    assert sorted(kept) == [(0, a, b) for a, b in wanted]


def split_questions(tokenizer: Tokenizer, count: int) -> Encoded[PairedTree]:
    """Questions of six answers and all their pairs, in rows that hold few answers: each takes several trees."""
    texts = [f"answer {at} " + "milk " * 8 for at in range(6)]
    wanted = [(a, b) for a in range(6) for b in range(a + 1, 6)]
    return encode_pairs(
        tokenizer,
        [question(n, texts, wanted) for n in range(count)],
        titles=True,
        answers_per_question=8,
        max_question_tokens=64,
        max_answer_tokens=64,
        row_tokens=60,
        by_pairs=False,
        seed=0,
    )


def test_weights_of_a_question_sum_to_one_over_all_its_trees(tokenizer: Tokenizer) -> None:
    found = split_questions(tokenizer, 1)
    assert len(found.items) > 1
    assert sum(float(reward_row([one]).weight_P.sum()) for one in found.items) == pytest.approx(1.0)


@pytest.mark.parametrize("row", [512, 60])
@pytest.mark.parametrize(
    # Weighed by pairs, each pair counts 1: one is left of the first question, three of the second. Otherwise the
    # question counts 3 as a whole, whatever is left of it.
    ("by_pairs", "weight_P", "count"),
    [(True, [1.0, 1.0, 1.0, 1.0], 4.0), (False, [3.0, 1.0, 1.0, 1.0], 6.0)],
)
def test_pairs_that_are_left_out_take_their_weight_along_where_pairs_are_weighed(
    tokenizer: Tokenizer, row: int, by_pairs: bool, weight_P: list[float], count: float
) -> None:
    every = [(0, 1), (0, 2), (2, 1)]
    short = [f"answer {at} " + "milk " * 12 for at in range(3)]
    asked = [question(1, ["short", "milk " * 200, "brief"], every), question(2, short, every)]
    found = encode_pairs(
        tokenizer,
        [replace(one, weight=3.0) for one in asked],
        titles=True,
        answers_per_question=8,
        max_question_tokens=64,
        max_answer_tokens=64,
        row_tokens=row,
        by_pairs=by_pairs,
        seed=0,
    )
    assert len(found.items) == (2 if row == 512 else 4)
    weighed = [weight for one in found.items for weight in reward_row([one]).weight_P.tolist()]
    assert weighed == pytest.approx(weight_P)
    source = reward_source(found.items, questions_per_step=2, row_tokens=row, epochs=1, max_steps=None, seed=0)
    batch = source.next()
    assert batch is not None
    assert batch.counts["questions"] == count


def test_an_answer_too_long_takes_only_its_own_pairs(tokenizer: Tokenizer) -> None:
    kept, left_out = pairs_of(
        tokenizer, [question(1, ["short", "milk " * 200, "brief"], [(0, 1), (0, 2), (2, 1)])], longest=32
    )
    assert kept == [(0, 0, 2)]
    assert left_out["pairs with an answer longer than reward.max_answer_tokens"] == 2


def test_more_answers_than_allowed_leave_a_seeded_choice(tokenizer: Tokenizer) -> None:
    texts = [f"answer {at}" for at in range(7)]
    wanted = [(a, b) for a in range(7) for b in range(a + 1, 7)]
    kept, left_out = pairs_of(tokenizer, [question(1, texts, wanted)], answers=4)
    assert len({answer for _, b, w in kept for answer in (b, w)}) == 4
    assert len(kept) == 6
    assert left_out["pairs beyond answers_per_question"] == 15


def test_best_answers_go_by_the_score_rule_and_the_earliest_of_equals(tokenizer: Tokenizer) -> None:
    # 0 votes score 0, 4 votes round(log2 5) = 2 twice: of the equal ones the smaller id wins.
    asked = question(1, ["first", "second", "third"], [], votes=[0, 4, 4])
    found = encode_answers(tokenizer, [asked], titles=False, answers="best", max_tokens=64)
    assert [tokenizer.decode(branch[:-1]) for branch in found.items[0].branches] == [" second"]


def test_answers_that_do_not_fit_together_repeat_their_root(tokenizer: Tokenizer) -> None:
    asked = question(1, ["milk " * 8] * 5, [])
    found = encode_answers(tokenizer, [asked], titles=True, answers="all", max_tokens=80)
    assert all(len(tree) <= 80 for tree in found.items)
    assert sum(len(tree.branches) for tree in found.items) == 5
    assert len({tree.root for tree in found.items}) == 1


def test_prompts_keep_the_place_of_their_question(tokenizer: Tokenizer) -> None:
    long = question(2, ["x"], [])
    long = Question(long.site, 2, "tea " * 80, long.text, (), 0, long.date, WHO, long.answers)
    found = encode_prompts(tokenizer, [long, question(1, ["x"], [])], titles=True, max_tokens=64)
    assert [tree.key for tree in found.items] == [1]
    assert found.left_out == {"prompts longer than ppo.max_prompt_tokens": 1}


def test_a_plan_uses_every_item_once_an_epoch_in_another_order() -> None:
    plan = plan_steps([3, 1, 4, 1, 5, 2], per_step=6, epochs=2, max_steps=None, seed=0)
    sizes = [3, 1, 4, 1, 5, 2]
    assert all(sum(sizes[at] for at in step) <= 6 for step in plan)
    order = [at for step in plan for at in step]
    assert Counter(order) == dict.fromkeys(range(6), 2)
    assert order[:6] != order[6:]
    assert plan == plan_steps([3, 1, 4, 1, 5, 2], per_step=6, epochs=2, max_steps=None, seed=0)


def test_a_fraction_of_an_epoch_is_its_first_steps() -> None:
    whole = plan_steps([1] * 20, per_step=2, epochs=1, max_steps=None, seed=3)
    assert plan_steps([1] * 20, per_step=2, epochs=0.5, max_steps=None, seed=3) == whole[:5]
    assert plan_steps([1] * 20, per_step=2, epochs=1.5, max_steps=None, seed=3)[:10] == whole
    assert plan_steps([1] * 20, per_step=2, epochs=5, max_steps=3, seed=3) == whole[:3]


def test_sources_go_on_from_their_place(tokenizer: Tokenizer) -> None:
    questions = [question(n, [f"answer {at} of {n}" for at in range(3)], [(0, 1), (2, 0)]) for n in range(12)]
    trees = encode_answers(tokenizer, questions, titles=True, answers="all", max_tokens=200).items

    settings = {"tokens_per_step": 150, "row_tokens": 200, "epochs": 2, "max_steps": None, "seed": 0}
    one, two = (sft_source(trees, everything=False, **settings) for _ in range(2))  # type: ignore[arg-type]
    for _ in range(3):
        assert one.next() is not None
        one.observe(StepResult(1, 0.0, {}, 0.0, None))
    two.load_state_dict(one.state_dict())
    left, right = one.next(), two.next()
    assert left is not None
    assert right is not None
    assert [row.forest.tokens_T.tolist() for row in left.rows] == [row.forest.tokens_T.tolist() for row in right.rows]
    other = sft_source(trees[:5], everything=False, **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the data has changed"):
        other.load_state_dict(one.state_dict())


def test_counts_of_a_reward_batch_are_questions_whatever_their_trees(tokenizer: Tokenizer) -> None:
    trees = split_questions(tokenizer, 3).items
    source = reward_source(trees, questions_per_step=2, row_tokens=60, epochs=1, max_steps=None, seed=0)
    counts = []
    while (batch := source.next()) is not None:
        counts.append(batch.counts["questions"])
    assert counts == [2.0, 1.0]


def test_nothing_to_train_on_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match=r"nothing to train on.*sft\.max_tokens"):
        sft_source([], everything=False, tokens_per_step=1, row_tokens=1, epochs=1, max_steps=None, seed=0)
