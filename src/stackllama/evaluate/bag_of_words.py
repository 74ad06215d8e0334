"""A reward model that reads words without their order: what a real one has to beat.

Logistic regression (Bradley and Terry 1952) on the difference of two bags of words: each word has one weight, and an
answer's score is the sum of weights over its distinct words. It sees answers alone, as words of a question stand in
both of its answers' favour.

Legend: P pairs, W words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from stackllama.data.posts import Question
from stackllama.errors import DataError

MOST_WORDS = 20_000
MOST_PAIRS = 50_000
"""Pairs that it is fitted on, about, at most: of every so many questions one."""
RARE = 2
"""Answers that a word stands in at least."""
RIDGE = 1.0
"""Prior variance of a weight, in its inverse: the usual choice of C = 1."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class BagOfWords:
    """Weights of the words that are known."""

    weights: Mapping[str, float]

    def score(self, text: str) -> float:
        """Sum of the weights of an answer's distinct words, in log-odds of being the better answer."""
        # Exactly rounded, so that the order of a set does not matter and equal answers tie.
        return math.fsum(self.weights.get(word, 0.0) for word in words_of(text))


def words_of(text: str) -> set[str]:
    """The distinct words of a text: runs of letters, digits and underscores, in lower case."""
    return set(_WORD.findall(text.lower()))


def fit(questions: Sequence[Question]) -> BagOfWords:
    """Fit the weights to the pairs of some questions, which weigh the same however many pairs they have.

    Raises:
        DataError: when there is no pair.
    """
    bags, pairs, shares = _pairs(questions)
    if not pairs:
        raise DataError("no pair to learn words from: give more data, or a larger data.splits.reward")
    known = _vocabulary(bags)
    if not known:
        return BagOfWords({})
    numbered = [[known[word] for word in bag if word in known] for bag in bags]
    difference_PW = _differences(numbered, pairs, len(known))
    share_P = torch.tensor(shares, dtype=torch.float64)
    weight_W = torch.zeros(len(known), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_W], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        margin_P = (difference_PW @ weight_W.unsqueeze(1)).squeeze(1)
        found = (share_P * softplus(-margin_P)).sum() + RIDGE / 2 * weight_W.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return BagOfWords(dict(zip(known, weight_W.tolist(), strict=True)))


def _pairs(questions: Sequence[Question]) -> tuple[list[set[str]], list[tuple[int, int]], list[float]]:
    """(bag of each answer, (better, worse) as places of bags, weight of each pair)."""
    bags: list[set[str]] = []
    pairs: list[tuple[int, int]] = []
    shares: list[float] = []
    paired = [question for question in questions if question.pairs]
    step = max(1, -(-sum(len(question.pairs) for question in paired) // MOST_PAIRS))
    for question in paired[::step]:
        first = len(bags)
        bags += [words_of(answer.text) for answer in question.answers]
        pairs += [(first + pair.better, first + pair.worse) for pair in question.pairs]
        shares += [1 / len(question.pairs)] * len(question.pairs)
    return bags, pairs, shares


def _vocabulary(bags: Iterable[set[str]]) -> dict[str, int]:
    """The most frequent words, numbered; equally frequent ones in the order of the alphabet."""
    counts = Counter(word for bag in bags for word in bag)
    frequent = sorted((word for word, count in counts.items() if count >= RARE), key=lambda word: (-counts[word], word))
    return {word: at for at, word in enumerate(frequent[:MOST_WORDS])}


def _differences(numbered: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]], words: int) -> Tensor:
    """Bag of the better answer minus bag of the worse (P, W), sparse."""
    rows: list[int] = []
    columns: list[int] = []
    signs: list[float] = []
    for at, (better, worse) in enumerate(pairs):
        mine, theirs = set(numbered[better]), set(numbered[worse])
        for sign, only in ((1.0, mine - theirs), (-1.0, theirs - mine)):
            rows += [at] * len(only)
            columns += sorted(only)
            signs += [sign] * len(only)
    places = torch.tensor([rows, columns], dtype=torch.int64).reshape(2, -1)
    values, size = torch.tensor(signs, dtype=torch.float64), (len(pairs), words)
    return torch.sparse_coo_tensor(places, values, size, check_invariants=True).coalesce()
