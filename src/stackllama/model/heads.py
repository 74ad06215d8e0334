"""The scalar head: one number from a hidden state: a reward (at a branch's last token) or a value (anywhere)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """A linear map to one number, in fp32 whatever the trunk's precision.

    spread: standard deviation of the initial weights; 0 starts a value head at exactly 0, and 1 / sqrt(D + 1) is the
    start of a reward head (Stiennon et al. 2020, appendix B).
    """

    def __init__(self, hidden: int, *, spread: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, generator=generator) * spread)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Scores (N,), fp32."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return hidden_ND.float() @ self.weight + self.bias
