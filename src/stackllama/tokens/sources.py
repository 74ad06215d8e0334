"""From questions to packed rows: encoding, length limits, the order of training, and the sources of SFT and reward
batches.

The order of a whole run is a function of (seed, lengths, budgets): it is planned once, and a source's state is a place
in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from stackllama.data.pairs.rules import answer_score
from stackllama.data.posts import Document, Pair, Question
from stackllama.errors import DataError
from stackllama.tokens.batches import Batch, RewardRow, SftRow, StepResult
from stackllama.tokens.forest import Targets, Tree, branch_targets, last_tokens, plant, root_targets
from stackllama.tokens.packing import pack
from stackllama.tokens.template import encode_branch, encode_document, encode_root, question_text
from stackllama.tokens.tokenizer import Tokenizer

ItemT = TypeVar("ItemT")
RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class PairedTree:
    """A question with those of its answers that have pairs.

    pairs: (better, worse) branches of the tree; margins: by how much each is to differ, in reward; answers: for each
    branch, its place in the question's answers; share: what a pair weighs, 1 / (pairs of the question) times weight;
    weight: what the question counts for.
    """

    tree: Tree
    pairs: tuple[tuple[int, int], ...]
    margins: tuple[float, ...]
    answers: tuple[int, ...]
    share: float
    weight: float

    def __len__(self) -> int:
        return len(self.tree)


Dealt = tuple[PairedTree, ...]
"""A question: one tree, or several where its answers do not fit in one row."""


@dataclass(frozen=True, slots=True)
class Encoded(Generic[ItemT]):
    """Encoded items, and how many were left out under which reason."""

    items: tuple[ItemT, ...]
    left_out: Mapping[str, int]


def encode_answers(
    tokenizer: Tokenizer, questions: Sequence[Question], *, titles: bool, answers: str, max_tokens: int
) -> Encoded[Tree]:
    """Questions with the answers that SFT learns: "best" (by the score rule; the earliest of equals) or "all" of them.

    A branch that would reach beyond ``max_tokens`` (root included) is left out and counted, as is a question without
    any. A tree that would outgrow ``max_tokens`` as a whole is split: the root is repeated.
    """
    left_out = {"answers longer than sft.max_tokens": 0, "questions without an answer": 0}
    trees: list[Tree] = []
    for key, question in enumerate(questions):
        chosen = list(question.answers)
        if answers == "best" and chosen:
            chosen = [max(chosen, key=lambda answer: (answer_score(answer.votes, answer.accepted), -answer.id))]
        root = tuple(encode_root(tokenizer, question_text(question.title if titles else "", question.text)))
        branches = [tuple(encode_branch(tokenizer, answer.text)) for answer in chosen]
        fitting = tuple(branch for branch in branches if len(root) + len(branch) <= max_tokens)
        left_out["answers longer than sft.max_tokens"] += len(branches) - len(fitting)
        left_out["questions without an answer"] += not fitting
        trees.extend(Tree(root, hand, key) for hand in deal_branches(len(root), fitting, max_tokens))
    return Encoded(tuple(trees), left_out)


def deal_branches(root: int, branches: Sequence[tuple[int, ...]], most: int) -> list[tuple[tuple[int, ...], ...]]:
    """Deal branches, in order, to trees of at most ``most`` tokens with a root of ``root`` tokens."""
    dealt: list[list[tuple[int, ...]]] = []
    for branch in branches:
        if not dealt or root + sum(map(len, dealt[-1])) + len(branch) > most:
            dealt.append([])
        dealt[-1].append(branch)
    return [tuple(hand) for hand in dealt]


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], *, max_tokens: int) -> Encoded[Tree]:
    """Whole documents as roots without branches; those longer than ``max_tokens`` are left out and counted."""
    trees = [Tree(tuple(encode_document(tokenizer, document.text)), (), key) for key, document in enumerate(documents)]
    kept = tuple(tree for tree in trees if 1 < len(tree) <= max_tokens)
    return Encoded(kept, {"documents longer than sft.max_tokens": len(trees) - len(kept)})


def encode_prompts(
    tokenizer: Tokenizer, questions: Sequence[Question], *, titles: bool, max_tokens: int
) -> Encoded[Tree]:
    """Prompts for sampling: roots alone, keyed by the question's place in the list."""
    trees = [
        Tree(tuple(encode_root(tokenizer, question_text(question.title if titles else "", question.text))), (), key)
        for key, question in enumerate(questions)
    ]
    kept = tuple(tree for tree in trees if len(tree) <= max_tokens)
    return Encoded(kept, {"prompts longer than ppo.max_prompt_tokens": len(trees) - len(kept)})


def encode_pairs(
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    titles: bool,
    answers_per_question: int,
    max_question_tokens: int,
    max_answer_tokens: int,
    row_tokens: int,
    by_pairs: bool,
    seed: int,
) -> Encoded[PairedTree]:
    """Questions with their pairs, each pair in one tree that fits a row.

    Over ``answers_per_question`` answers, a seeded choice is kept. A question too long is left out, and so are pairs
    with an answer too long. A tree that outgrows the row repeats its root: its pairs are dealt to several trees.

    The pairs that are left share their question's weight, unless questions are weighed ``by_pairs``: then a pair that
    is left out takes its part of the weight along, so that every pair of every question weighs the same.
    """
    left_out = {
        "questions longer than reward.max_question_tokens": 0,
        "pairs with an answer longer than reward.max_answer_tokens": 0,
    }
    left_out |= {"pairs beyond answers_per_question": 0, "questions without a pair": 0}
    found: list[PairedTree] = []
    for key, question in enumerate(questions):
        root = tuple(encode_root(tokenizer, question_text(question.title if titles else "", question.text)))
        if len(root) > max_question_tokens:
            left_out["questions longer than reward.max_question_tokens"] += 1
            continue
        kept = _chosen_answers(question, answers_per_question, seed)
        branches = {at: tuple(encode_branch(tokenizer, question.answers[at].text)) for at in kept}
        inside = [pair for pair in question.pairs if pair.better in branches and pair.worse in branches]
        left_out["pairs beyond answers_per_question"] += len(question.pairs) - len(inside)
        limit = min(max_answer_tokens, (row_tokens - len(root)) // 2)
        short = [pair for pair in inside if all(len(branches[at]) <= limit for at in (pair.better, pair.worse))]
        left_out["pairs with an answer longer than reward.max_answer_tokens"] += len(inside) - len(short)
        if not short:
            left_out["questions without a pair"] += 1
            continue
        weight = question.weight * len(short) / len(question.pairs) if by_pairs else question.weight
        found.extend(_deal_pairs(root, branches, short, key=key, weight=weight, row_tokens=row_tokens))
    return Encoded(tuple(found), left_out)


def _chosen_answers(question: Question, most: int, seed: int) -> set[int]:
    """Places of at most ``most`` answers, those with pairs first; a choice by (seed, question)."""
    paired = sorted({at for pair in question.pairs for at in (pair.better, pair.worse)})
    if len(paired) <= most:
        return set(paired)
    return set(np.random.default_rng([seed, question.id]).permutation(paired)[:most].tolist())


def _deal_pairs(
    root: tuple[int, ...],
    branches: Mapping[int, tuple[int, ...]],
    pairs: Sequence[Pair],
    *,
    key: int,
    weight: float,
    row_tokens: int,
) -> list[PairedTree]:
    """Deal pairs to as few trees as a greedy pass finds, each of at most ``row_tokens``."""
    dealt: list[list[Pair]] = []
    for pair in pairs:
        for hand in dealt:
            members = {at for other in [*hand, pair] for at in (other.better, other.worse)}
            if len(root) + sum(len(branches[at]) for at in members) <= row_tokens:
                hand.append(pair)
                break
        else:
            dealt.append([pair])
    trees = []
    for hand in dealt:
        chosen = sorted({at for pair in hand for at in (pair.better, pair.worse)})
        place = {at: index for index, at in enumerate(chosen)}
        tree = Tree(root, tuple(branches[at] for at in chosen), key)
        inside = tuple((place[pair.better], place[pair.worse]) for pair in hand)
        margins = tuple(pair.margin for pair in hand)
        trees.append(PairedTree(tree, inside, margins, tuple(chosen), weight / len(pairs), weight))
    return trees


def sft_row(trees: Sequence[Tree], *, everything: bool) -> SftRow:
    """A row for SFT. ``everything``: learn root tokens too (documents); otherwise answers alone."""
    forest = plant(trees)
    if not everything:
        return SftRow(forest, branch_targets(forest))
    roots, branches = root_targets(forest), branch_targets(forest)
    return SftRow(
        forest,
        Targets(
            torch.cat([roots.predictor_N, branches.predictor_N]),
            torch.cat([roots.label_N, branches.label_N]),
            torch.cat([roots.branch_N, branches.branch_N + len(trees)]),  # numbered on behind the roots
        ),
    )


def reward_row(trees: Sequence[PairedTree]) -> RewardRow:
    """A row for the reward model: the trees' pairs, renumbered along the row."""
    forest = plant([item.tree for item in trees])
    better: list[int] = []
    worse: list[int] = []
    margins: list[float] = []
    shares: list[float] = []
    offset = 0
    for item in trees:
        better += [offset + b for b, _ in item.pairs]
        worse += [offset + w for _, w in item.pairs]
        margins += item.margins
        shares += [item.share] * len(item.pairs)
        offset += len(item.tree.branches)
    numbers = (torch.tensor(column) for column in (better, worse, margins, shares))
    return RewardRow(forest, last_tokens(forest), *numbers)


def plan_steps(
    sizes: Sequence[int], *, per_step: int, epochs: float, max_steps: int | None, seed: int
) -> list[list[int]]:
    """The places of each step's items: every epoch a new shuffle by (seed, epoch), cut wherever ``per_step`` is
    reached.

    sizes: what an item counts against ``per_step`` (its tokens, or 1 to count items). A fraction of an epoch is its
    first steps. ``max_steps`` ends the plan earlier, never later.
    """
    steps: list[list[int]] = []
    epoch = 0
    while epochs > epoch:
        order = np.random.default_rng([seed, epoch]).permutation(len(sizes)).tolist()
        cut = _cut(order, sizes, per_step)
        steps += cut[: max(1, round(len(cut) * min(1.0, epochs - epoch)))]
        epoch += 1
    return steps[:max_steps]


def _cut(order: Sequence[int], sizes: Sequence[int], per_step: int) -> list[list[int]]:
    steps: list[list[int]] = [[]]
    held = 0
    for at in order:
        if held and held + sizes[at] > per_step:
            steps.append([])
            held = 0
        steps[-1].append(at)
        held += sizes[at]
    return steps


class PlannedSource(Generic[ItemT, RowT]):
    """Batches of a planned order. ``make_batch`` turns a step's items into a batch; the state is a place.

    limits: the settings that may have left every item out.
    """

    def __init__(
        self,
        items: Sequence[ItemT],
        plan: Sequence[Sequence[int]],
        make_batch: Callable[[list[ItemT]], Batch[RowT]],
        *,
        unit: str,
        total_work: int,
        limits: str,
    ) -> None:
        if not items:
            raise DataError(
                f"nothing to train on: the split holds no text within {limits}; raise it, or give more data"
            )
        self.unit = unit
        self.total_work = total_work
        self.total_steps = len(plan)
        self._items = items
        self._plan = plan
        self._make_batch = make_batch
        self._place = 0
        self._ready: Batch[RowT] | None = None

    @property
    def given(self) -> int:
        """How many of the planned batches have been given out."""
        return self._place

    def prepare(self) -> None:
        """Make the next planned batch and keep it; the place stays."""
        if self._ready is None and self._place < len(self._plan):
            self._ready = self._make_batch([self._items[at] for at in self._plan[self._place]])

    def next(self) -> Batch[RowT] | None:
        """The next planned batch."""
        self.prepare()
        batch, self._ready = self._ready, None
        self._place += batch is not None
        return batch

    def observe(self, result: StepResult) -> None:
        """A planned source goes on whatever happened."""

    def state_dict(self) -> dict[str, Any]:
        """The place in the plan, and the plan's length to catch another plan."""
        return {"place": self._place, "steps": len(self._plan)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            DataError: when the state belongs to a plan of another length.
        """
        if state["steps"] != len(self._plan):
            raise DataError(
                f"the checkpoint was made with {state['steps']} planned steps, this data gives {len(self._plan)}; "
                "the data has changed"
            )
        self._place, self._ready = state["place"], None


def sft_source(
    trees: Sequence[Tree],
    *,
    everything: bool,
    tokens_per_step: int,
    row_tokens: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
) -> PlannedSource[Tree, SftRow]:
    """Packed documents, by a budget of tokens a step. The count ``tokens`` is of tokens learnt; progress counts all."""

    def make(chosen: list[Tree]) -> Batch[SftRow]:
        rows = tuple(sft_row(trees, everything=everything) for trees in pack(chosen, row_tokens))
        learnt = float(sum(len(row.targets.label_N) for row in rows))
        return Batch(rows, {"tokens": learnt}, sum(map(len, chosen)), {"tokens": learnt})

    plan = plan_steps(
        [len(tree) for tree in trees], per_step=tokens_per_step, epochs=epochs, max_steps=max_steps, seed=seed
    )
    total = sum(len(trees[at]) for step in plan for at in step)
    return PlannedSource(trees, plan, make, unit="tokens", total_work=total, limits="sft.max_tokens")


def reward_source(
    trees: Sequence[PairedTree],
    *,
    questions_per_step: int,
    row_tokens: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
) -> PlannedSource[Dealt, RewardRow]:
    """Whole questions, so many a step; a question dealt to several trees stays in one step and counts once.

    The count ``questions``, which divides the loss, is the sum of their weights; ``length_ratios`` is the weighted sum
    over pairs of the squared log ratio of their lengths.
    """
    by_question: dict[int, list[PairedTree]] = {}
    for item in trees:
        by_question.setdefault(item.tree.key, []).append(item)
    questions = [tuple(items) for items in by_question.values()]

    def make(chosen: list[Dealt]) -> Batch[RewardRow]:
        flat = [item for question in chosen for item in question]
        rows = tuple(reward_row(trees) for trees in pack(flat, row_tokens))
        weight = sum(items[0].weight for items in chosen)
        return Batch(rows, _reward_counts(rows, weight), len(chosen), {"questions": float(len(chosen))})

    plan = plan_steps([1] * len(questions), per_step=questions_per_step, epochs=epochs, max_steps=max_steps, seed=seed)
    limits = "reward.max_question_tokens and reward.max_answer_tokens"
    return PlannedSource(questions, plan, make, unit="questions", total_work=sum(map(len, plan)), limits=limits)


def _reward_counts(rows: Sequence[RewardRow], questions: float) -> dict[str, float]:
    """What divides the sums over a batch's rows; questions: the sum of the questions' weights."""
    squares = sum(float((row.weight_P * row.length_ratio_P.square()).sum()) for row in rows)
    # Where all pairs are of equal length, the sum that this divides is 0 too.
    return {"questions": float(questions), "length_ratios": squares or 1.0}
