"""The floating-point operations (FLOPs) that training needs, counted on paper, for the share of a machine's rate.

For a token and P weights of the linear layers, LoRA needs 2 P forward and 2 P backward to the inputs, and for its own
weights of rank r and their gradients 6 r (d_in + d_out) a layer; where all weights are trained, their gradients take
another 2 P. The output matrix of V x D takes as much as any other. Attention of H heads of E over K visible tokens
takes 4 H E K forward and 8 H E K backward. Where only some places are read in the end (a reward is read behind each
answer), the last layer needs keys and values of all tokens, and the rest for those places alone.

What is computed twice to save memory is not counted, nor what padding or a question computed once for each pair costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def linears(config: Any) -> dict[str, tuple[int, int]]:
    """Linear layer of one block of a Llama -> (features in, features out)."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    narrow = config.num_key_value_heads * (d // heads)
    attention = {"q_proj": (d, d), "k_proj": (d, narrow), "v_proj": (d, narrow), "o_proj": (d, d)}
    return {**attention, "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}


def visible(trees: Sequence[tuple[int, Sequence[int]]]) -> float:
    """How many tokens a token sees on average, itself included, in trees of a root and branches of these lengths."""
    seen = tokens = 0.0
    for root, branches in trees:
        seen += root * (root + 1) / 2 + sum(one * root + one * (one + 1) / 2 for one in branches)
        tokens += root + sum(branches)
    return seen / tokens


def per_token(config: Any, *, rank: int | None, seen: float, read: float = 1.0, vocabulary: bool = True) -> float:
    """FLOPs for a token that sees ``seen`` tokens, by the formula above.

    rank: of the adapters on every linear layer, or None: all weights are trained; read: the share of tokens whose last
    state is read; vocabulary: whether that is read through the output matrix.
    """
    each = 6 if rank is None else 4

    def cost(name: str, ins: int, outs: int) -> float:
        whole = each * ins * outs + 6 * (rank or 0) * (ins + outs)
        return whole + (12 * config.hidden_size * seen if name == "q_proj" else 0.0)

    costs = {name: cost(name, *sizes) for name, sizes in linears(config).items()}
    narrow = costs["k_proj"] + costs["v_proj"]
    layer = sum(costs.values())
    head = each * config.vocab_size * config.hidden_size * read if vocabulary else 0.0
    return (config.num_hidden_layers - 1) * layer + narrow + read * (layer - narrow) + head
