"""By which kernels a row is attended to: what a layer asks of attention decides, and where the row lies.

no window that matters, no cap, no sinks    flash.py, on CUDA in 16 bits alone
otherwise, on the CPU                       blocks.py
otherwise, on CUDA                          flex.py
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stackllama.model.attention import ForestPlan, Rule
from stackllama.model.blocks import plan_blocks
from stackllama.model.flash import FlashPlan, plan_flash
from stackllama.model.flash_cuda import WIDEST_HEAD
from stackllama.model.flex import plan_flex
from stackllama.tokens.forest import Forest

LONG_SIGHT = 80
"""Tokens that a token sees on average, from which flash kernels are faster than blocks on the CPU. Below it they take
0.6 to 1.5 times as long, the longest for texts of 16 tokens; above it half to 0.8 times (decision 18).
"""


@dataclass(slots=True)
class RowPlan:
    """All plans of one row, each made when a layer first needs it and used by every layer that does."""

    forest: Forest
    device: torch.device
    _flash: FlashPlan | None = field(default=None, init=False)
    _general: ForestPlan | None = field(default=None, init=False)

    def attend(self, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, rule: Rule) -> Tensor:
        """What every token (T, H, E) gathers from those that it sees; differentiable."""
        if self._is_plain(rule) and self._has_flash(query_THE):
            if self._flash is None:
                self._flash = plan_flash(self.forest, self.device)
            return self._flash.attend(query_THE, key_TKE, value_TKE, rule.scaling)
        if self._general is None:
            on_cuda = self.device.type == "cuda"
            self._general = plan_flex(self.forest, self.device) if on_cuda else plan_blocks(self.forest)
        return self._general.attend(query_THE, key_TKE, value_TKE, rule)

    def _is_plain(self, rule: Rule) -> bool:
        return rule.softcap is None and rule.sinks_H is None and (rule.window is None or rule.window >= self._reach)

    def _has_flash(self, query_THE: Tensor) -> bool:
        if query_THE.is_cuda:
            return query_THE.dtype in (torch.bfloat16, torch.float16) and query_THE.shape[-1] <= WIDEST_HEAD
        return mean_sight(self.forest) >= LONG_SIGHT

    @property
    def _reach(self) -> int:
        """Tokens of the longest root with its longest branch: a window of so many hides nothing."""
        return max(one.length + (0 if one.is_root else one.root_stop - one.root_start) for one in self.forest.segments)


def mean_sight(forest: Forest) -> float:
    """How many tokens a token of the row sees on average, itself included."""
    edges = 0.0
    for one in forest.segments:
        root = 0 if one.is_root else one.root_stop - one.root_start
        edges += one.length * (root + (one.length + 1) / 2)
    return edges / len(forest)
