"""The sampler's cache: keys and values of R sequences, each with its own length, in one preallocated block for each
layer.

Legend: R sequences, K key/value heads, G query heads for each of them, L places, E head dimension, T tokens of a
prefilled row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stackllama.model.attention import Rule, probabilities
from stackllama.tokens.forest import Segment


class SequenceCache:
    """Keys and values of R sequences of at most ``places`` tokens.

    segment_of: for each sequence, the segment of the prefilled row that is its prompt; sequences may share one.
    device: where the model works.
    """

    def __init__(self, segment_of: Sequence[Segment], *, places: int, device: torch.device) -> None:
        lengths = [segment.length for segment in segment_of]
        self.lengths_R = torch.tensor(lengths, device=device)
        self._longest = max(lengths)  # known here, so that no step waits for the device to tell
        self._segments = list(segment_of)
        self._places = places
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def record(self, layer: int, key_1KTE: Tensor, value_1KTE: Tensor) -> None:
        """Copy each sequence's prompt out of a prefilled row."""
        for store, row in ((self._keys, key_1KTE[0]), (self._values, value_1KTE[0])):
            heads, _, size = row.shape
            block = row.new_zeros(len(self._segments), heads, self._places, size)
            for at, segment in enumerate(self._segments):
                block[at, :, : segment.length] = row[:, segment.start : segment.stop]
            store[layer] = block

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Append one token a sequence (R, K, 1, E) and attend to all it may see; query (R, H, 1, E) -> (R, 1, H, E).

        The lengths are the ones before this token; `grow` moves them on once every layer has seen it.
        """
        rows, heads, _, size = key.shape
        each = torch.arange(rows, device=key.device)
        self._keys[layer][each, :, self.lengths_R] = key[:, :, 0]
        self._values[layer][each, :, self.lengths_R] = value[:, :, 0]
        used = self._longest + 1
        keys, values = (store[layer][:, :, :used].flatten(0, 1) for store in (self._keys, self._values))
        query_BGE = query.reshape(rows * heads, -1, size)
        scores = torch.bmm(query_BGE, keys.transpose(1, 2)).float().mul_(rule.scaling)
        place = torch.arange(used, device=key.device)
        distance_RL = self.lengths_R[:, None] - place
        hidden_RL = distance_RL < 0
        if rule.window is not None:
            hidden_RL |= distance_RL >= rule.window
        spread = scores.view(rows, -1, 1, used)
        prob = probabilities(spread, hidden_RL[:, None, None], rule).view(scores.shape).to(values.dtype)
        return torch.bmm(prob, values).view(rows, 1, -1, size)

    def grow(self) -> None:
        """Count the token that was just attended."""
        self.lengths_R = self.lengths_R + 1
        self._longest += 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences only."""
        self.lengths_R = self.lengths_R[rows]
        self._longest = int(self.lengths_R.max())
        self._keys = {layer: block[rows] for layer, block in self._keys.items()}
        self._values = {layer: block[rows] for layer, block in self._values.items()}
