"""Attention over forests on CUDA: torch's FlexAttention under a mask that knows segments.

The mask reads tensors, windows included, and rows have few lengths (`padded`), so few kernels are compiled; torch gives
up after eight. Blocks of 128 x 128 that no edge of the forest enters are skipped. Keys and values are not repeated for
their query heads. On the CPU the same function runs uncompiled and without a backward: for tests.

Legend: T tokens of the padded row, H query heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from stackllama.model.attention import Rule
from stackllama.tokens.forest import Forest

SHORTEST = 1024
"""Tokens of the shortest padded row. Each other length is compiled anew."""
_NO_WINDOW = 2**31 - 1


def padded(tokens: int) -> int:
    """Length to which a row of so many tokens is padded: a power of two."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


@dataclass(frozen=True, slots=True)
class FlexPlan:
    """A padded row on a device: each token's segment, its root's segment and its position (T,), int64. What pads the
    row is a segment of its own.
    """

    segment_T: Tensor
    root_T: Tensor
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
        query, key, value = (x[None].transpose(1, 2) for x in (query_THE, key_TKE, value_TKE))
        out_1HTE = _kernel(query.device.type)(
            query,
            key,
            value,
            score_mod=None if rule.softcap is None else _capping(rule.softcap),
            block_mask=self.masks[rule.window],
            scale=rule.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_1HTE[0].transpose(0, 1)

    def _mask(self, window: int | None) -> BlockMask:
        reach = torch.tensor(_NO_WINDOW if window is None else window, device=self.segment_T.device)

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = self.segment_T[key] == self.segment_T[query]
            seen = (key <= query) & (same | (self.segment_T[key] == self.root_T[query]))
            return seen & (self.position_T[query] - self.position_T[key] < reach)

        length = len(self.segment_T)
        return create_block_mask(visible, None, None, length, length, device=self.segment_T.device)


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    plain = cast("Callable[..., Tensor]", flex_attention)
    return torch.compile(plain, dynamic=False) if device == "cuda" else plain


@cache  # a function of its own for each cap would be compiled for each
def _capping(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def plan_flex(forest: Forest, device: torch.device) -> FlexPlan:
    """The plan of a row, for a row padded to `padded(len(forest))` tokens."""
    length = padded(len(forest))
    number = {segment.start: at for at, segment in enumerate(forest.segments)}
    sizes = torch.tensor([segment.length for segment in forest.segments] + [length - len(forest)])
    roots = [number[segment.root_start] for segment in forest.segments]
    segment_T = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    root_T = torch.repeat_interleave(torch.tensor([*roots, len(roots)]), sizes)
    position_T = torch.nn.functional.pad(forest.positions_T, (0, length - len(forest)))
    return FlexPlan(segment_T.to(device), root_T.to(device), position_T.to(device))
