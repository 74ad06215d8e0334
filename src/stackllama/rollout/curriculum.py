"""A curriculum by length: short prompts first, and longer ones as the policy gains competence. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stackllama.tokens.forest import Tree


def competence(progress: float, start: float) -> float:
    """Give the share of the prompts, the shortest first, that may be asked: ``start`` at progress 0, 1 at progress 1.

    It grows as the root of the progress, so that each prompt that comes in is as likely to be asked as the ones before
    it were. progress: 0 to 1; start: above 0, to 1. Raises ValueError for numbers out of range. Source: Platanios et
    al. 2019, "Competence-based curriculum learning for neural machine translation", eq. 7, with length as difficulty.
    """
    if not 0 <= progress <= 1 or not 0 < start <= 1:
        raise ValueError(f"progress is {progress} and start {start}, allowed are 0 to 1 and above 0 to 1")
    return math.sqrt(progress * (1 - start**2) + start**2)


def admitted(prompts: Sequence[Tree], at_round: int, *, rounds: int, least: int) -> list[Tree]:
    """The prompts that may be asked in a round (counted from 0), the shortest first; equally long ones in their order.

    rounds: over which longer ones come in; from the last of them on it is all. least: what the first round may ask.
    """
    if at_round >= rounds - 1:
        return list(prompts)
    share = competence(at_round / (rounds - 1), least / len(prompts))
    # A share that is a whole number of prompts must not become one more by its rounding.
    count = math.ceil(share * len(prompts) - 1e-9)
    return sorted(prompts, key=lambda tree: len(tree.root))[:count]
