"""Log-probabilities and entropies without ever storing (tokens x vocabulary) logits.

Hidden states meet the output matrix chunk by chunk; each chunk's logits become a log-probability (and, if asked, an
entropy, or its slope) and are thrown away. A chunk holds ``CHUNK_ELEMENTS`` logits at most.

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


class _TokenLogProb(torch.autograd.Function):
    """log softmax(h W')[label], with gradients to h and, where it is trained, to W.

    Under a frozen W the slopes d log p / d h are worked out while a chunk's logits are at hand, and kept; under a
    trained one its gradient needs the weight of each token, so the backward computes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, softcap: float | None) -> Tensor:
        logprob_N = torch.empty(len(label_N), dtype=torch.float32, device=hidden_ND.device)
        frozen = not ctx.needs_input_grad[1]
        slope_ND = torch.empty_like(hidden_ND) if frozen and ctx.needs_input_grad[0] else None
        for part in _chunks(len(label_N), len(weight_VD)):
            logits_CV = _logits(hidden_ND[part], weight_VD, softcap)
            logprob_CV = torch.log_softmax(logits_CV, dim=-1)
            logprob_N[part] = logprob_CV.gather(1, label_N[part, None]).squeeze(1)
            if slope_ND is not None:
                d_logits = _slopes(logprob_CV, logits_CV, label_N[part], softcap).to(weight_VD.dtype)
                torch.mm(d_logits, weight_VD, out=slope_ND[part])
        ctx.save_for_backward(*((slope_ND,) if frozen else (hidden_ND, weight_VD, label_N)))
        ctx.softcap = softcap
        return logprob_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad_N,) = grad_outputs
        if len(ctx.saved_tensors) == 1:
            (slope_ND,) = ctx.saved_tensors
            return (grad_N[:, None] * slope_ND).to(slope_ND.dtype), None, None, None
        hidden_ND, weight_VD, label_N = ctx.saved_tensors
        _, d_hidden, d_weight = _gradients(hidden_ND, weight_VD, label_N, ctx.softcap, grad_N)
        return d_hidden, d_weight.to(weight_VD.dtype), None, None


class _SummedLogProb(torch.autograd.Function):
    """The sum of the log-probabilities: every token weighs the same, so both gradients come of one pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, softcap: float | None) -> Tensor:
        total, d_hidden, d_weight = _gradients(hidden_ND, weight_VD, label_N, softcap, None)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        (grad,) = grad_outputs
        return (d_hidden * grad).to(d_hidden.dtype), (d_weight * grad).to(ctx.dtype), None, None


def _gradients(
    hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, softcap: float | None, grad_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the log-probabilities, and its gradients to h and (in fp32) to W, with each token's weight `grad_N`;
    None weighs all the same.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    d_hidden = torch.empty_like(hidden_ND)
    d_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=hidden_ND.device)
    for part in _chunks(len(label_N), len(weight_VD)):
        logits_CV = _logits(hidden_ND[part], weight_VD, softcap)
        logprob_CV = torch.log_softmax(logits_CV, dim=-1)
        total += logprob_CV.gather(1, label_N[part, None]).sum()
        d_logits = _slopes(logprob_CV, logits_CV, label_N[part], softcap)
        d_logits = (d_logits if grad_N is None else d_logits.mul_(grad_N[part, None])).to(weight_VD.dtype)
        torch.mm(d_logits, weight_VD, out=d_hidden[part])
        d_weight += d_logits.T @ hidden_ND[part]
    return total, d_hidden, d_weight


def _slopes(logprob_CV: Tensor, logits_CV: Tensor, label_C: Tensor, softcap: float | None) -> Tensor:
    """Derivatives of log p[label] by the logits before any softcap: [v = label] - p[v], in place of the log p."""
    slope_CV = logprob_CV.exp_().neg_()
    slope_CV.scatter_add_(1, label_C[:, None], torch.ones_like(slope_CV[:, :1]))
    return slope_CV if softcap is None else slope_CV.mul_(1.0 - (logits_CV / softcap).square())


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Log-probability in nats (N,), fp32, of each label under softmax(hidden W').

    hidden_ND and weight_VD share one precision (bf16 products are summed in fp32 by the kernel); differentiable in
    both.

    Raises:
        ValueError: when the precisions or the shapes do not fit.
    """
    _check(hidden_ND, weight_VD)
    return cast("Tensor", _TokenLogProb.apply(hidden_ND, weight_VD, label_N, softcap))  # type: ignore[no-untyped-call]


def summed_logprobs(hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """The sum (), fp32, of what `token_logprobs` gives; cheaper to differentiate where the output matrix is trained."""
    _check(hidden_ND, weight_VD)
    trained = weight_VD.requires_grad and torch.is_grad_enabled()
    if not trained:
        return token_logprobs(hidden_ND, weight_VD, label_N, softcap=softcap).sum()
    return cast("Tensor", _SummedLogProb.apply(hidden_ND, weight_VD, label_N, softcap))  # type: ignore[no-untyped-call]


def _check(hidden_ND: Tensor, weight_VD: Tensor) -> None:
    if hidden_ND.dtype != weight_VD.dtype or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states {tuple(hidden_ND.shape)} {hidden_ND.dtype} and output matrix {tuple(weight_VD.shape)} "
            f"{weight_VD.dtype} do not fit; cast the hidden states to the matrix's precision"
        )


@torch.no_grad()
def token_entropies(hidden_ND: Tensor, weight_VD: Tensor, *, softcap: float | None = None) -> Tensor:
    """Entropy in nats (N,), fp32, of the next-token distribution at each position. For metrics: carries no gradient."""
    entropy_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    for part in _chunks(len(hidden_ND), len(weight_VD)):
        logprob_CV = torch.log_softmax(_logits(hidden_ND[part], weight_VD, softcap), dim=-1)
        entropy_N[part] = -(logprob_CV.exp() * logprob_CV).sum(-1)
    return entropy_N
