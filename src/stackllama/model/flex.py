"""Attention over forests on CUDA: torch's FlexAttention under a mask that knows segments.

The mask reads tensors, windows included, and rows have few lengths (`padded`), so few kernels are compiled.
Blocks of 128 x 128 that no edge of the forest enters are skipped. Keys and values are not repeated for their query
heads. On the CPU the same function runs uncompiled and without a backward: for tests.

Legend: T tokens of the padded row, I blocks of queries, J blocks of keys, H query heads, K key/value heads, E head
dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from stackllama.model.attention import Rule
from stackllama.model.kernels import compiled
from stackllama.tokens.forest import Forest

BLOCK = 128
"""Queries, and keys, of a block."""
SHORTEST = 1024
"""Tokens of the shortest padded row. Each other length is compiled anew."""
_NO_WINDOW = 2**31 - 1


def padded(tokens: int) -> int:
    """Length to which a row of so many tokens is padded: a power of two."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


@dataclass(frozen=True, slots=True)
class FlexPlan:
    """A row on a device, padded to T tokens, by token (T,), int64: the place where its own segment begins, those where
    its root begins and ends (the same, for a root's tokens), and its position. What pads the row sees itself alone.
    """

    start_T: Tensor
    root_start_T: Tensor
    root_stop_T: Tensor
    position_T: Tensor
    masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def attend(self, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, rule: Rule) -> Tensor:
        """What every token (T, H, E) gathers from those that it sees; differentiable on CUDA.

        Raises:
            ValueError: for attention sinks, which FlexAttention does not know.
        """
        if rule.sinks_H is not None:
            raise ValueError("attention sinks (s_aux) have no kernel on CUDA; use a model without them, or the CPU")
        if rule.window not in self.masks:
            self.masks[rule.window] = self._mask(rule.window)
        tokens, length = len(query_THE), len(self.start_T)
        query, key, value = (
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, length - tokens))[None].transpose(1, 2)
            for x in (query_THE, key_TKE, value_TKE)
        )
        out_1HTE = _kernel(query.device.type)(
            query,
            key,
            value,
            score_mod=None if rule.softcap is None else _capping(rule.softcap),
            block_mask=self.masks[rule.window],
            scale=rule.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_1HTE[0, :, :tokens].transpose(0, 1)

    def _mask(self, window: int | None) -> BlockMask:
        start_T, root_start_T, root_stop_T, position_T = (
            self.start_T,
            self.root_start_T,
            self.root_stop_T,
            self.position_T,
        )
        reach = torch.full((), _NO_WINDOW if window is None else window, device=start_T.device)

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (key >= start_T[query]) & (key <= query)
            root = (key >= root_start_T[query]) & (key < root_stop_T[query])
            return (own | root) & (position_T[query] - position_T[key] < reach)

        edges_IJ = self._edges(reach)
        whole_IJ = edges_IJ == BLOCK * BLOCK
        return BlockMask.from_kv_blocks(
            *_listed((edges_IJ > 0) & ~whole_IJ), *_listed(whole_IJ), BLOCK_SIZE=BLOCK, mask_mod=visible
        )

    def _edges(self, reach: Tensor) -> Tensor:
        """How many of its queries' keys lie in each block (I, J): counted from the ends of the two runs of keys that a
        query sees, so that no matrix of all queries and keys is ever made.
        """
        place_T = torch.arange(len(self.start_T), device=self.start_T.device)
        first_J = place_T[::BLOCK]
        root_T = torch.maximum(self.root_start_T, self.root_start_T + self.position_T - reach + 1)
        own_T = torch.maximum(self.start_T, place_T - reach + 1)

        def within(start_T: Tensor, stop_T: Tensor) -> Tensor:
            stop_TJ = torch.minimum(stop_T[:, None], first_J + BLOCK)
            return (stop_TJ - torch.maximum(start_T[:, None], first_J)).clamp_(min=0)

        edges_TJ = within(root_T, self.root_stop_T).add_(within(own_T, place_T + 1))
        return edges_TJ.unflatten(0, (-1, BLOCK)).sum(1)


def _listed(chosen_IJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries has, and which (the chosen first, in order): what FlexAttention takes."""
    order_IJ = torch.argsort(chosen_IJ.int(), dim=-1, descending=True, stable=True)
    return chosen_IJ.sum(-1, dtype=torch.int32)[None, None], order_IJ.int()[None, None]


def _kernel(device: str) -> Callable[..., Tensor]:
    plain = cast("Callable[..., Tensor]", flex_attention)
    return compiled(plain, dynamic=False) if device == "cuda" else plain


@cache  # a function of its own for each cap would be compiled for each
def _capping(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def plan_flex(forest: Forest, device: torch.device) -> FlexPlan:
    """The plan of a row."""
    tokens, length = len(forest), padded(len(forest))
    ends = [(s.start, s.root_start, s.root_start if s.is_root else s.root_stop) for s in forest.segments]
    sizes = torch.tensor([segment.length for segment in forest.segments])
    padding_P = torch.arange(tokens, length)
    by_token = torch.cat([torch.tensor(ends).repeat_interleave(sizes, 0), padding_P[:, None].expand(-1, 3)])
    position_T = torch.cat([forest.positions_T, torch.zeros_like(padding_P)])
    # Without waiting for what the device has yet to do: so small a copy leaves the host's memory at once.
    start_T, root_start_T, root_stop_T = by_token.T.contiguous().to(device, non_blocking=True)
    return FlexPlan(start_T, root_start_T, root_stop_T, position_T.to(device, non_blocking=True))
