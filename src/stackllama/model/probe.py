"""The probe that every loaded model passes before anything is built on it: packed equals separate, and trees do not
leak.

It compares log-probabilities of a small random forest, computed as the project computes them, with the model's own
logits for each sequence alone under transformers' ``eager`` attention. A model whose configuration scales logits, adds
biases or attends in a way that the forest does not know fails here, by name.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stackllama.errors import ModelError
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.tokens.forest import Forest, Tree, branch_targets, plant

# Norm-relative difference of log-probabilities that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def probe(model: PreTrainedModel) -> None:
    """Try the model on a forest of four trees.

    Raises:
        ModelError: when a packed sequence differs from the same sequence alone, or one tree changes another.
    """
    name = type(model).__name__
    dtype = next(model.parameters()).dtype
    trees = _trees(int(model.get_output_embeddings().weight.shape[0]))
    forest = plant(trees)
    packed_N = _packed(model, forest, dtype)
    alone_N = torch.cat([_alone(model, tree.root, branch) for tree in trees for branch in tree.branches])
    apart = float((packed_N - alone_N).norm() / alone_N.norm())
    if not apart <= TOLERANCE.get(dtype, 5e-2):
        raise ModelError(
            f"{name} does not give packed sequences the log-probabilities that they have alone (off by {apart:.1e}); "
            "its attention, positions or output scaling are of a kind that the packed forest does not know; use "
            "another base model"
        )
    changed = [Tree(trees[0].root[::-1], trees[0].branches), *trees[1:]]
    own = sum(map(len, trees[0].branches))
    if not torch.equal(_packed(model, plant(changed), dtype)[own:], packed_N[own:]):
        raise ModelError(
            f"{name} lets one packed sequence change another: its layers carry state along the row; "
            "use another base model"
        )


def _trees(vocabulary: int) -> list[Tree]:
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(count))

    return [Tree(tokens(9 + 3 * at), (tokens(7 + at), tokens(5)), at) for at in range(4)]


def _packed(model: PreTrainedModel, forest: Forest, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the branches, as the project computes them in the model's own precision."""
    with Trunk(model, precision=dtype).use(REFERENCE) as role:
        return role.logprobs(role.hidden(forest), branch_targets(forest))


def _alone(model: PreTrainedModel, root: tuple[int, ...], branch: tuple[int, ...]) -> Tensor:
    """Log-probabilities of the branch by the model's own forward over the whole sequence."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            ids = torch.tensor([[*root, *branch]], device=model.device)
            logprob_TV = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
    finally:
        model.set_attn_implementation(own)
    place = torch.arange(len(root) - 1, ids.shape[1] - 1)
    return logprob_TV[place, ids[0, 1:][place]]
