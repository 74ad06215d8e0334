"""What a policy's answers are like: perplexity of human answers, and the numbers of sampled ones.

Legend: T tokens of a row, N scored tokens, S responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from stackllama.errors import DataError
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.objectives.masked import sum_per_sequence
from stackllama.rollout.engine import Request, Response, Sampling, sample
from stackllama.rollout.experience import response_scores
from stackllama.tokens.batches import SftRow
from stackllama.tokens.forest import Tree, branch_targets, plant
from stackllama.tokens.packing import pack
from stackllama.tokens.sources import sft_row

Floats = NDArray[np.float64]
REPEATED_GRAM = 4


@dataclass(frozen=True, slots=True)
class Answered:
    """A policy's responses to a list of prompts, one each, with what the roles say of them.

    reward, judge: scores (S,); kl: sum over the response's tokens of log policy - log reference, in nats (S,);
    reference_nll: sum over the response's tokens of - log reference, in nats (S,).
    """

    responses: tuple[Response, ...]
    reward: Floats
    judge: Floats
    kl: Floats
    reference_nll: Floats


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model makes of held-out texts, by question: summed negative log-likelihood in nats, and tokens (Q,)."""

    nll: Floats
    tokens: Floats

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood over all tokens."""
        return math.exp(self.nll.sum() / self.tokens.sum())


def likelihood(trunk: Trunk, role: str, trees: Sequence[Tree], *, everything: bool, row_tokens: int) -> Likelihood:
    """Read trees under a role; a question that was dealt to several trees counts once. `everything`: documents.

    Raises:
        DataError: when there is no tree.
    """
    if not trees:
        raise DataError(
            "no held-out text is short enough for a perplexity; raise sft.max_tokens or data.splits.eval, or give more "
            "data"
        )
    sums = {tree.key: [0.0, 0] for tree in trees}
    with trunk.use(role) as reader:
        for packed in pack(trees, row_tokens):
            row: SftRow = sft_row(packed, everything=everything)
            logprob_N = reader.logprobs(reader.hidden(row.forest), row.targets).double().cpu()
            keys = [*([tree.key for tree in packed] if everything else []), *row.forest.tree_of_branch]
            found_B = sum_per_sequence(logprob_N, row.targets.branch_N, len(keys))
            count_B = torch.bincount(row.targets.branch_N, minlength=len(keys))
            for key, logprob, count in zip(keys, found_B.tolist(), count_B.tolist(), strict=True):
                sums[key][0] -= logprob
                sums[key][1] += count
    nll, tokens = np.array(list(sums.values())).T
    return Likelihood(nll, tokens)


def answer_prompts(
    trunk: Trunk,
    role: str,
    prompts: Sequence[Tree],
    sampling: Sampling,
    *,
    reward_role: str,
    judge_role: str,
    row_tokens: int,
) -> Answered:
    """Sample one response for each prompt and score it. The noise is keyed by the prompt's place, equal for all
    policies.
    """
    with trunk.use(role) as policy:
        responses = sample(policy, [Request(at, tree.root) for at, tree in enumerate(prompts)], sampling)
    trees = answer_trees(prompts, responses)
    reward, judge = (
        response_scores(trunk, scorer, trees, eos_id=sampling.eos_id, row_tokens=row_tokens).double().numpy()
        for scorer in (reward_role, judge_role)
    )
    return Answered(tuple(responses), reward, judge, *read_back(trunk, role, trees, row_tokens=row_tokens))


def answer_trees(prompts: Sequence[Tree], responses: Sequence[Response]) -> list[Tree]:
    """Each prompt with its response, keyed by its place."""
    pairs = zip(prompts, responses, strict=True)
    return [Tree(tree.root, (one.tokens,), at) for at, (tree, one) in enumerate(pairs)]


def tie_equal_answers(answered: Answered, other: Answered) -> Answered:
    """The same answers, with the other's scores wherever both said the same. In bf16 the last bits of a score depend on
    the row that it was packed into, and equal answers must tie.
    """
    pairs = zip(answered.responses, other.responses, strict=True)
    same = np.array([mine.tokens == theirs.tokens for mine, theirs in pairs])
    return replace(
        answered,
        reward=np.where(same, other.reward, answered.reward),
        judge=np.where(same, other.judge, answered.judge),
    )


def read_back(trunk: Trunk, role: str, trees: Sequence[Tree], *, row_tokens: int) -> tuple[Floats, Floats]:
    """KL of each tree's one response, and its negative log-likelihood under the reference (S,), in nats, in the order
    of the trees. The reference's KL from itself is 0.
    """
    rows = [(packed, plant(packed)) for packed in pack(trees, row_tokens)]
    sums: dict[str, Floats] = {}
    for name in dict.fromkeys((role, REFERENCE)):
        sums[name] = np.zeros(len(trees))
        with trunk.use(name) as reader:
            for packed, forest in rows:
                targets = branch_targets(forest)
                logprob_N = reader.logprobs(reader.hidden(forest), targets).double().cpu()
                found_S = sum_per_sequence(logprob_N, targets.branch_N, len(packed))
                sums[name][[tree.key for tree in packed]] = found_S.numpy()
    return sums[role] - sums[REFERENCE], -sums[REFERENCE]


def repetition(tokens: Sequence[int], *, gram: int = REPEATED_GRAM) -> float:
    """Fraction of a response's n-grams that occurred before in it; 0 when it is shorter than one n-gram (Welleck et al.
    2020, "Neural text generation with unlikelihood training", section 6: seq-rep-n).
    """
    grams = [tuple(tokens[at : at + gram]) for at in range(len(tokens) - gram + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(responses: Sequence[Sequence[int]], *, gram: int = 2) -> float:
    """Distinct n-grams of all responses together over their number (Li et al. 2016)."""
    grams = [tuple(tokens[at : at + gram]) for tokens in responses for at in range(len(tokens) - gram + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
