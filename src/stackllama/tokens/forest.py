"""The packed forest: trees of tokens laid end to end in one row, without padding.

A tree is a *root* (a question, a prompt, a whole document) and its *branches* (answers, sampled responses). Two trees,
the first with two branches, the second a document alone, become one row of T = 9 tokens::

    token     q0 q1 | a0 a1 | b0 b1 | d0 d1 d2
    segment    0  0 |  1  1 |  2  2 |  3  3  3
    root       0  0 |  0  0 |  0  0 |  3  3  3
    position   0  1 |  2  3 |  2  3 |  0  1  2

A token sees the earlier tokens of its own segment and all of its root; ``b0`` sees ``q0 q1`` and never ``a0 a1``. A
branch's positions go on from its root's length, so with rotary positions each log-probability equals that of the
separate sequence.

Legend: T tokens of the row, N scored tokens, B branches of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tree:
    """One root and its branches, as token ids. ``key`` names the tree to its source (a question's place, a prompt's
    id).
    """

    root: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()
    key: int = 0

    def __len__(self) -> int:
        """Tokens of the tree: its root once and every branch."""
        return len(self.root) + sum(map(len, self.branches))


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens ``start:stop`` of the row that hangs on the root at ``root_start:root_stop`` (itself, for a
    root).
    """

    start: int
    stop: int
    root_start: int
    root_stop: int

    @property
    def is_root(self) -> bool:
        """Whether the segment is a root."""
        return self.start == self.root_start

    @property
    def length(self) -> int:
        """Tokens of the segment."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Forest:
    """One packed row.

    tokens_T and positions_T are int64; segments lie in the order of the row; ``tree_of_branch`` has B entries, the key
    of each branch's tree, in the order of the branches in the row.
    """

    tokens_T: Tensor
    positions_T: Tensor
    segments: tuple[Segment, ...]
    tree_of_branch: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.tokens_T.numel())

    @property
    def branches(self) -> tuple[Segment, ...]:
        """The B segments that are branches, in the order of the row."""
        return tuple(segment for segment in self.segments if not segment.is_root)


@dataclass(frozen=True, slots=True)
class Targets:
    """The N tokens of a row that are scored.

    predictor_N: the place whose hidden state predicts the token; label_N: the token's id; branch_N: the branch (or, for
    documents, the root) that it belongs to, counted along the row. All int64.
    """

    predictor_N: Tensor
    label_N: Tensor
    branch_N: Tensor


def plant(trees: Sequence[Tree]) -> Forest:
    """Lay trees end to end in one row, roots before their branches.

    Raises:
        ValueError: for no tree at all, or an empty root or branch, which could not be attended to or scored.
    """
    if not trees:
        raise ValueError("a forest needs at least one tree")
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    keys: list[int] = []
    for tree in trees:
        if not tree.root or not all(tree.branches):
            raise ValueError(f"tree {tree.key} has an empty root or branch; every segment needs at least one token")
        root_start, root_stop = len(tokens), len(tokens) + len(tree.root)
        tokens.extend(tree.root)
        positions.extend(range(len(tree.root)))
        segments.append(Segment(root_start, root_stop, root_start, root_stop))
        for branch in tree.branches:
            start = len(tokens)
            tokens.extend(branch)
            positions.extend(range(len(tree.root), len(tree.root) + len(branch)))
            segments.append(Segment(start, len(tokens), root_start, root_stop))
            keys.append(tree.key)
    return Forest(torch.tensor(tokens), torch.tensor(positions), tuple(segments), tuple(keys))


def branch_targets(forest: Forest) -> Targets:
    """Every token of every branch; a branch's first token is predicted by its root's last."""
    return _targets(forest, [(s.root_stop - 1, s) for s in forest.branches])


def root_targets(forest: Forest) -> Targets:
    """Every token of every root but its first, which nothing predicts."""
    return _targets(forest, [(None, s) for s in forest.segments if s.is_root])


def _targets(forest: Forest, scored: Sequence[tuple[int | None, Segment]]) -> Targets:
    predictors: list[int] = []
    places: list[int] = []
    owners: list[int] = []
    for owner, (before, segment) in enumerate(scored):
        own = range(segment.start, segment.stop)
        first = [] if before is None else [before]
        chain = [*first, *own]
        predictors.extend(chain[:-1])
        places.extend(chain[1:])
        owners.extend([owner] * (len(chain) - 1))
    places_N = torch.tensor(places, dtype=torch.int64)
    return Targets(
        torch.tensor(predictors, dtype=torch.int64),
        forest.tokens_T[places_N],
        torch.tensor(owners, dtype=torch.int64),
    )


def last_tokens(forest: Forest) -> Tensor:
    """Place of each branch's last token (B,), where its score is read."""
    return torch.tensor([segment.stop - 1 for segment in forest.branches], dtype=torch.int64)
