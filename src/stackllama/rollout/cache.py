"""The sampler's cache: keys and values of the running sequences, each with its own length, in one preallocated block
for each layer.

Running sequences are always the first rows: the last one moves into the place of one that leaves.

Legend: R running sequences, K key/value heads, L places, E head dimension, T tokens of a prefilled row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stackllama.model.attention import Rule, probabilities
from stackllama.tokens.forest import Segment


class SequenceCache:
    """Keys and values of at most ``slots`` sequences of at most ``places`` tokens; device: where the model works."""

    def __init__(self, slots: int, *, places: int, device: torch.device) -> None:
        self._slots, self._places, self._device = slots, places, device
        self._lengths: list[int] = []  # known here, so that no step waits for the device to tell
        self._lengths_R: Tensor | None = None  # the same on the device, until they change
        self._arriving: list[Segment] = []
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def lengths_R(self) -> Tensor:
        """Tokens of each running sequence, int64."""
        if self._lengths_R is None:
            self._lengths_R = torch.tensor(self._lengths, dtype=torch.int64).to(self._device, non_blocking=True)
        return self._lengths_R

    def expect(self, prompts: Sequence[Segment]) -> None:
        """New sequences behind the running ones: of a row that is read next, the segments that are their prompts;
        several may share one.
        """
        assert len(self._lengths) + len(prompts) <= self._slots, "more sequences than slots"
        self._arriving = list(prompts)

    def arrive(self) -> None:
        """The row was read: the new sequences run."""
        self._lengths += [prompt.length for prompt in self._arriving]
        self._lengths_R, self._arriving = None, []

    def record(self, layer: int, key_1KTE: Tensor, value_1KTE: Tensor) -> None:
        """Copy each new sequence's prompt out of a prefilled row."""
        for store, row in ((self._keys, key_1KTE[0]), (self._values, value_1KTE[0])):
            heads, _, size = row.shape
            if layer not in store:
                store[layer] = row.new_zeros(self._slots, heads, self._places, size)
            for at, prompt in enumerate(self._arriving, start=len(self._lengths)):
                store[layer][at, :, : prompt.length] = row[:, prompt.start : prompt.stop]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Append one token a sequence (R, K, 1, E) and attend to all it may see; query (R, H, 1, E) -> (R, 1, H, E).

        The lengths are the ones before this token; `grow` moves them on once every layer has seen it.
        """
        rows, heads, _, size = key.shape
        lengths_R, each_R = self.lengths_R, torch.arange(rows, device=key.device)
        self._keys[layer][each_R, :, lengths_R] = key[:, :, 0]
        self._values[layer][each_R, :, lengths_R] = value[:, :, 0]
        used = max(self._lengths) + 1
        keys, values = (store[layer][:rows, :, :used].flatten(0, 1) for store in (self._keys, self._values))
        query_BGE = query.reshape(rows * heads, -1, size)
        scores = torch.bmm(query_BGE, keys.transpose(1, 2)).float().mul_(rule.scaling)
        place_L = torch.arange(used, device=key.device)
        distance_RL = lengths_R[:, None] - place_L
        hidden_RL = distance_RL < 0
        if rule.window is not None:
            hidden_RL |= distance_RL >= rule.window
        spread = scores.view(rows, -1, 1, used)
        prob = probabilities(spread, hidden_RL[:, None, None], rule).view(scores.shape).to(values.dtype)
        return torch.bmm(prob, values).view(rows, 1, -1, size)

    def grow(self) -> None:
        """Count the token that was just attended."""
        self._lengths, self._lengths_R = [length + 1 for length in self._lengths], None

    def leave(self, row: int) -> None:
        """Forget a sequence; the last one takes its row."""
        last = len(self._lengths) - 1
        if row != last:
            length = self._lengths[last]
            for store in (self._keys, self._values):
                for block in store.values():
                    block[row, :, :length] = block[last, :, :length]
            self._lengths[row] = length
        self._lengths.pop()
        self._lengths_R = None
