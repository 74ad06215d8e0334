"""Log-probabilities and entropies without ever storing (tokens x vocabulary) logits.

Hidden states meet the output matrix chunk by chunk; each chunk's logits become a log-probability (and, if asked, an
entropy) and are thrown away; the backward computes them again. A chunk holds ``CHUNK_ELEMENTS`` logits at most.

Legend: N scored positions, D hidden size, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24


def _chunks(count: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _logits(hidden_CD: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
    """(C, V) in fp32; ``softcap`` bounds them by cap * tanh(logit / cap), as Gemma 2 does."""
    logits_CV = torch.nn.functional.linear(hidden_CD, weight_VD).float()
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)


class _LinearLogProb(torch.autograd.Function):
    """log softmax(h W')[label], with gradients to h and, where it is trained, to W."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, softcap: float | None) -> Tensor:
        logprob_N = torch.empty(len(label_N), dtype=torch.float32, device=hidden_ND.device)
        total_N = torch.empty_like(logprob_N)
        for part in _chunks(len(label_N), len(weight_VD)):
            logits_CV = _logits(hidden_ND[part], weight_VD, softcap)
            total_N[part] = torch.logsumexp(logits_CV, dim=-1)
            logprob_N[part] = logits_CV.gather(1, label_N[part, None]).squeeze(1) - total_N[part]
        ctx.save_for_backward(hidden_ND, weight_VD, label_N, total_N)
        ctx.softcap = softcap
        return logprob_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad_N,) = grad_outputs
        hidden_ND, weight_VD, label_N, total_N = ctx.saved_tensors
        softcap: float | None = ctx.softcap
        d_hidden = torch.empty_like(hidden_ND)
        d_weight = torch.zeros(weight_VD.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(label_N), len(weight_VD)):
            logits_CV = _logits(hidden_ND[part], weight_VD, softcap)
            d_logits = torch.exp(logits_CV - total_N[part, None]).mul_(-grad_N[part, None])
            d_logits.scatter_add_(1, label_N[part, None], grad_N[part, None])
            if softcap is not None:
                d_logits.mul_(1.0 - (logits_CV / softcap).square())
            d_logits = d_logits.to(weight_VD.dtype)
            d_hidden[part] = (d_logits @ weight_VD).to(hidden_ND.dtype)
            if d_weight is not None:
                d_weight += d_logits.T @ hidden_ND[part]
        return d_hidden, None if d_weight is None else d_weight.to(weight_VD.dtype), None, None


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Log-probability in nats (N,), fp32, of each label under softmax(hidden W').

    hidden_ND and weight_VD share one precision (bf16 products are summed in fp32 by the kernel); differentiable in
    both.

    Raises:
        ValueError: when the precisions or the shapes do not fit.
    """
    if hidden_ND.dtype != weight_VD.dtype or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states {tuple(hidden_ND.shape)} {hidden_ND.dtype} and output matrix {tuple(weight_VD.shape)} "
            f"{weight_VD.dtype} do not fit; cast the hidden states to the matrix's precision"
        )
    return cast("Tensor", _LinearLogProb.apply(hidden_ND, weight_VD, label_N, softcap))  # type: ignore[no-untyped-call]


@torch.no_grad()
def token_entropies(hidden_ND: Tensor, weight_VD: Tensor, *, softcap: float | None = None) -> Tensor:
    """Entropy in nats (N,), fp32, of the next-token distribution at each position. For metrics: carries no gradient."""
    entropy_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    for part in _chunks(len(hidden_ND), len(weight_VD)):
        logprob_CV = torch.log_softmax(_logits(hidden_ND[part], weight_VD, softcap), dim=-1)
        entropy_N[part] = -(logprob_CV.exp() * logprob_CV).sum(-1)
    return entropy_N
