"""Best-of-n: what choosing among the SFT model's own answers by the training reward gives, without any training.

It is what a policy has to beat at the KL that it costs (Stiennon et al. 2020, "Learning to summarize from human
feedback"; Gao et al. 2023, "Scaling laws for reward model overoptimization").

Legend: S prompts, B = S n answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stackllama.evaluate.policy import Answered, answer_trees, read_back
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.rollout.engine import Request, Response, Sampling, sample
from stackllama.rollout.experience import response_scores
from stackllama.tokens.forest import Tree


def kl_bound(n: int) -> float:
    """Most that the KL of best-of-n from the model that it chooses from can be, in nats: log n - (n - 1) / n.

    Stiennon et al. 2020, appendix G.3, give it as the KL; Beirami et al. 2024, "Theoretical guarantees on the
    best-of-n alignment policy", show that it is a bound, which ties and short answers stay below.
    """
    return math.log(n) - (n - 1) / n


def answer_best_of(
    trunk: Trunk,
    prompts: Sequence[Tree],
    sampling: Sampling,
    n: int,
    *,
    reward_role: str,
    judge_role: str,
    row_tokens: int,
) -> Answered:
    """Answer each prompt n times as the SFT model and keep the answer with the highest reward, the first of equals.

    The answers are other ones than that of `policy.answer_prompts`: their noise is keyed by the numbers behind it, so
    that the chosen one and the SFT model's own answer are independent, as a win rate takes them to be. The samples of a
    prompt share its prefill, and no more run at a time than of the other policies. `kl` is `kl_bound` for each.
    """
    assert n > 1, n
    requests = [
        Request((1 + draw) * len(prompts) + at, tree.root) for at, tree in enumerate(prompts) for draw in range(n)
    ]
    with trunk.use(REFERENCE) as policy:
        responses_B = sample(policy, requests, sampling)
    trees = [
        Tree(tree.root, tuple(one.tokens for one in responses_B[at * n : (at + 1) * n]), at)
        for at, tree in enumerate(prompts)
    ]
    scores = response_scores(trunk, reward_role, trees, eos_id=sampling.eos_id, row_tokens=row_tokens)
    score_Sn = scores.double().numpy().reshape(len(prompts), n)
    best_S = score_Sn.argmax(1)
    chosen: list[Response] = [responses_B[at * n + int(best)] for at, best in enumerate(best_S)]
    trees = answer_trees(prompts, chosen)
    judge = response_scores(trunk, judge_role, trees, eos_id=sampling.eos_id, row_tokens=row_tokens).double().numpy()
    _, reference_nll = read_back(trunk, REFERENCE, trees, row_tokens=row_tokens)
    return Answered(
        tuple(chosen),
        reward=score_Sn.max(1),
        judge=judge,
        kl=np.full(len(prompts), kl_bound(n)),
        reference_nll=reference_nll,
    )
