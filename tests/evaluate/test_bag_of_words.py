"""A bag of words finds the words that decide, and nothing where none do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stackllama.data.posts import Answer, Attribution, Pair, Question
from stackllama.errors import DataError
from stackllama.evaluate import bag_of_words
from stackllama.evaluate.bag_of_words import fit, words_of

WHO = Attribution("https://example/q/1", "Ann", 1, None, "CC BY-SA 4.0")


def question(*texts: str, pairs: tuple[Pair, ...] = (Pair(0, 1, 1),)) -> Question:
    answers = tuple(Answer(at, text, 0, False, "2020-01-01", WHO) for at, text in enumerate(texts))
    return Question("one", 1, "t", "q", (), 0, "2020-01-01", WHO, answers, pairs)


def test_words_are_distinct_and_in_lower_case() -> None:
    assert words_of("The the x_1, über-THE!") == {"the", "x_1", "über"}


def test_the_weight_of_one_word_worked_by_hand() -> None:
    # n times "good" stands in the better answer alone: n log(1 + e^-w) + w^2 / 2 is least where n / (1 + e^w) = w.
    bag = fit([question("good day", "day")] * 10)
    weight = bag.weights["good"]
    assert 10 / (1 + math.exp(weight)) == pytest.approx(weight, rel=1e-5)
    assert bag.weights["day"] == pytest.approx(0, abs=1e-9)
    assert bag.score("Good, good, unheard of") == weight


def test_a_question_counts_once_whatever_its_pairs() -> None:
    many = question("good", "bad", "bad", pairs=(Pair(0, 1, 1), Pair(0, 2, 1)))
    assert fit([many] * 5).weights == pytest.approx(fit([question("good", "bad")] * 5).weights, rel=1e-5)


def test_it_ranks_held_out_answers_by_the_word_that_decides() -> None:
    draw = np.random.default_rng(0)
    filler = [" ".join(draw.choice(["alpha", "beta", "gamma", "delta"], 6)) for _ in range(400)]
    asked = [question(f"{a} thanks", b) for a, b in zip(filler[::2], filler[1::2], strict=True)]
    bag = fit(asked[:100])
    assert all(bag.score(one.answers[0].text) > bag.score(one.answers[1].text) for one in asked[100:])
    assert max(bag.weights, key=lambda word: bag.weights[word]) == "thanks"


def test_rare_words_are_not_learned_and_the_vocabulary_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit([question("common once", "twice"), question("common", "twice")]).weights.keys() == {"common", "twice"}
    monkeypatch.setattr(bag_of_words, "MOST_WORDS", 1)
    assert fit([question("b a", "x")] * 2).weights.keys() == {"a"}  # of equally frequent ones the first


def test_questions_without_pairs_are_passed_over_and_none_at_all_is_an_error() -> None:
    empty = question("a", "b", pairs=())
    assert fit([empty, question("a", "b"), question("a", "b")]).weights["a"] > 0
    with pytest.raises(DataError, match=r"no pair to learn words from.*data\.splits\.reward"):
        fit([empty])


def test_answers_that_differ_in_unknown_words_alone_tie_in_any_order() -> None:
    words = [f"w{at}" for at in range(40)]
    bag = bag_of_words.BagOfWords({word: 0.1 * at - 1.7 for at, word in enumerate(words)})
    assert len({bag.score(" ".join([*words[at:], *words[:at], f"new{at}"])) for at in range(40)}) == 1


def test_where_no_word_stands_twice_all_answers_tie() -> None:
    bag = fit([question("alpha", "beta"), question("", "delta")])
    assert bag.score("alpha") == bag.score("delta") == 0
