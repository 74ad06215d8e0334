"""Attention that understands forests: one function for every supported model, registered with transformers as "forest".

A model built with ``attn_implementation="forest"`` must be called with ``forest_plan=`` (training, scoring, prefill)
and/or ``key_value_cache=`` (prefill, decoding). The keywords travel through the model's forward to each layer's
attention. The model's own mask is never used: the mask function registered beside it returns None, and a call with
neither keyword raises, so no layer can ever attend without one of the two saying what is visible.

A plan says how a row is attended to: `plans.py` chooses its kernels.

Legend: R rows, T tokens, H query heads, K key/value heads, E head dimension, B Q L scores by batch, query and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NEUTRAL_KEYWORDS = frozenset({"position_ids", "use_cache", "cache_position", "position_embeddings", "logits_to_keep"})


class KeyValueCache(Protocol):
    """What a sampler hands to the model: keeps keys and values, and attends one new token of each row to them."""

    def record(self, layer: int, key_1KTE: Tensor, value_1KTE: Tensor) -> None:
        """Keep the keys and values of a prefilled forest."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Append one token a row and attend to all that the row may see."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores become probabilities. scaling: factor on q.k; window: visible position distance, below; softcap: bound
    of the scores by cap * tanh(score / cap); sinks_H: a learnt extra logit for each head that takes probability and
    gives nothing.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None


class ForestPlan(Protocol):
    """All that attention needs to know of one row, made once and used by every layer."""

    def attend(self, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, rule: Rule) -> Tensor:
        """What every token (T, H, E) gathers from those that it sees; differentiable."""


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return scores.div_(softcap).tanh_().mul_(softcap)


def probabilities(scores_BHQL: Tensor, hidden: Tensor, rule: Rule) -> Tensor:
    """Softmax over visible keys, in the scores' precision. ``hidden`` broadcasts to the scores; true means not visible.

    scores_BHQL is overwritten. With sinks, the rows sum to less than 1: the rest went to the sink.
    """
    if rule.softcap is not None:
        scores_BHQL = _capped(scores_BHQL, rule.softcap)
    scores_BHQL.masked_fill_(hidden, float("-inf"))
    if rule.sinks_H is None:
        return torch.softmax(scores_BHQL, dim=-1)
    sinks = rule.sinks_H.to(scores_BHQL.dtype)[None, :, None, None].expand(*scores_BHQL.shape[:-1], 1)
    return torch.softmax(torch.cat([scores_BHQL, sinks], dim=-1), dim=-1)[..., :-1]


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    forest_plan: ForestPlan | None = None,
    key_value_cache: KeyValueCache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer: query (R, H, T, E), key and value (R, K, T, E) -> (R, T, H,
    E).

    Raises:
        ValueError: for a keyword that it does not honour, attention dropout, or neither a plan nor a cache.
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in NEUTRAL_KEYWORDS)
    if unknown or dropout or attention_mask is not None:
        what = [
            *unknown,
            *(["dropout"] if dropout else []),
            *(["attention_mask"] if attention_mask is not None else []),
        ]
        raise ValueError(
            f"forest attention was given {', '.join(what)}, which it does not honour; it would be wrong to go on"
        )
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    layer = cast("int", getattr(module, "layer_idx", 0))
    query, key = query.to(value.dtype), key.to(value.dtype)
    if forest_plan is None:
        if key_value_cache is None:
            raise ValueError(
                "forest attention needs forest_plan= or key_value_cache=; call the model through its roles"
            )
        return key_value_cache.attend(layer, query, key, value, rule), None
    if key_value_cache is not None:
        key_value_cache.record(layer, key, value)
    query_THE, key_TKE, value_TKE = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return forest_plan.attend(query_THE, key_TKE, value_TKE, rule)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """The plan or the cache says what is visible; the model's own mask is not built."""


def register() -> None:
    """Make "forest" known to transformers, with its mask function."""
    AttentionInterface.register("forest", forest_attention)
    AttentionMaskInterface.register("forest", _no_mask)


register()
