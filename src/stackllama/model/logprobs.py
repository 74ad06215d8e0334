"""Log-probabilities and entropies without ever storing (tokens x vocabulary) logits.

Hidden states meet the output matrix chunk by chunk; each chunk's logits become a log-probability or an entropy (and,
where gradients are on, its slopes) and are thrown away. A chunk holds ``CHUNK_ELEMENTS`` logits at most.

Legend: N scored positions, D hidden size, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from stackllama.model.kernels import one_kernel

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""By device: a GPU multiplies small matrices below its rate."""


def _chunks(count: int, weight_VD: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS[weight_VD.device.type] // len(weight_VD))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _Measure(Protocol):
    """A number of each position's logits: its values, and its derivatives by them."""

    def values(self, raw_CV: Tensor, part: slice) -> Tensor:
        """The numbers (C,), fp32, of the positions in ``part``, of logits as the product gives them."""

    def slopes(self, raw_CV: Tensor, part: slice, weight_C: Tensor | None) -> tuple[Tensor, Tensor]:
        """The numbers, and their derivatives (C, V) by the logits before any softcap, times each position's weight, in
        the logits' precision.
        """


@dataclass(frozen=True, slots=True)
class _LabelLogProb:
    """The log p[label]; its derivatives are [v = label] - p[v]."""

    label_N: Tensor
    softcap: float | None

    def values(self, raw_CV: Tensor, part: slice) -> Tensor:
        return _label_logprobs(raw_CV, self.label_N[part], self.softcap)

    def slopes(self, raw_CV: Tensor, part: slice, weight_C: Tensor | None) -> tuple[Tensor, Tensor]:
        label_C = self.label_N[part]
        logprob_C, slope_CV, own_C1 = _slopes(raw_CV, label_C, self.softcap, weight_C)
        return logprob_C, slope_CV.scatter_(1, label_C[:, None], own_C1)


@dataclass(frozen=True, slots=True)
class _Entropy:
    """The entropy H; its derivatives are -p[v] (log p[v] + H)."""

    softcap: float | None

    def values(self, raw_CV: Tensor, part: slice) -> Tensor:  # noqa: ARG002 (it needs the logits alone)
        return _entropies(raw_CV, self.softcap)

    def slopes(
        self,
        raw_CV: Tensor,
        part: slice,  # noqa: ARG002
        weight_C: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return _entropy_slopes(raw_CV, self.softcap, weight_C)


class _PerToken(torch.autograd.Function):
    """A measure of the logits h W', with gradients to h and, where it is trained, to W.

    Under a frozen W the slopes by h are worked out while a chunk's logits are at hand, and kept; under a trained one
    its gradient needs the weight of each token, so the backward computes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, measure: _Measure) -> Tensor:
        value_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        frozen = not ctx.needs_input_grad[1]
        slope_ND = torch.empty_like(hidden_ND) if frozen and ctx.needs_input_grad[0] else None
        for part in _chunks(len(hidden_ND), weight_VD):
            raw_CV = linear(hidden_ND[part], weight_VD)
            if slope_ND is None:
                value_N[part] = measure.values(raw_CV, part)
            else:
                value_N[part], slope_CV = measure.slopes(raw_CV, part, None)
                torch.mm(slope_CV, weight_VD, out=slope_ND[part])
        ctx.save_for_backward(*((slope_ND,) if frozen else (hidden_ND, weight_VD)))
        ctx.measure = measure
        return value_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_N,) = grad_outputs
        if len(ctx.saved_tensors) == 1:
            (slope_ND,) = ctx.saved_tensors
            return (grad_N[:, None] * slope_ND).to(slope_ND.dtype), None, None
        hidden_ND, weight_VD = ctx.saved_tensors
        _, d_hidden, d_weight = _gradients(hidden_ND, weight_VD, ctx.measure, grad_N)
        return d_hidden, d_weight.to(weight_VD.dtype), None


class _SummedLogProb(torch.autograd.Function):
    """The sum of the log-probabilities: every token weighs the same, so both gradients come of one pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, softcap: float | None) -> Tensor:
        total, d_hidden, d_weight = _gradients(hidden_ND, weight_VD, _LabelLogProb(label_N, softcap), None)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        (grad,) = grad_outputs
        return (d_hidden * grad).to(d_hidden.dtype), (d_weight * grad).to(ctx.dtype), None, None


def _gradients(
    hidden_ND: Tensor, weight_VD: Tensor, measure: _Measure, grad_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of a measure, and its gradients to h and (in fp32) to W, with each token's weight `grad_N`; None weighs
    all the same.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    d_hidden = torch.empty_like(hidden_ND)
    d_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=hidden_ND.device)
    for part in _chunks(len(hidden_ND), weight_VD):
        raw_CV = linear(hidden_ND[part], weight_VD)
        value_C, slope_CV = measure.slopes(raw_CV, part, None if grad_N is None else grad_N[part])
        total += value_C.sum()
        torch.mm(slope_CV, weight_VD, out=d_hidden[part])
        d_weight += slope_CV.T @ hidden_ND[part]
    return total, d_hidden, d_weight


@one_kernel
def _label_logprobs(raw_CV: Tensor, label_C: Tensor, softcap: float | None) -> Tensor:
    """The log p[label] (C,), fp32, of logits as the product gives them."""
    return torch.log_softmax(_capped(raw_CV, softcap), dim=-1).gather(1, label_C[:, None]).squeeze(1)


@one_kernel
def _slopes(
    raw_CV: Tensor, label_C: Tensor, softcap: float | None, weight_C: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The log p[label] (C,), fp32, -p[v] for every v, and 1 - p[label]; the last two are derivatives, with softcap and
    weight, in the logits' precision.
    """
    logits_CV = _capped(raw_CV, softcap)
    logprob_CV = torch.log_softmax(logits_CV, dim=-1)
    logprob_C1 = logprob_CV.gather(1, label_C[:, None])
    slope_CV, own_C1 = logprob_CV.exp_().neg_(), 1.0 - logprob_C1.exp()
    if softcap is not None:
        bend_CV = 1.0 - (logits_CV / softcap).square()
        slope_CV, own_C1 = slope_CV.mul_(bend_CV), own_C1 * bend_CV.gather(1, label_C[:, None])
    if weight_C is not None:
        slope_CV, own_C1 = slope_CV.mul_(weight_C[:, None]), own_C1 * weight_C[:, None]
    return logprob_C1.squeeze(1), slope_CV.to(raw_CV.dtype), own_C1.to(raw_CV.dtype)


def _capped(raw_CV: Tensor, softcap: float | None) -> Tensor:
    """Logits in fp32; ``softcap`` bounds them by cap * tanh(logit / cap), as Gemma 2 does."""
    logits_CV = raw_CV.float()
    return logits_CV if softcap is None else logits_CV.div(softcap).tanh_().mul_(softcap)


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Log-probability in nats (N,), fp32, of each label under softmax(hidden W').

    hidden_ND and weight_VD share one precision (bf16 products are summed in fp32 by the kernel); differentiable in
    both.

    Raises:
        ValueError: when the precisions or the shapes do not fit.
    """
    return _per_token(hidden_ND, weight_VD, _LabelLogProb(label_N, softcap))


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


def token_entropies(hidden_ND: Tensor, weight_VD: Tensor, *, softcap: float | None = None) -> Tensor:
    """Entropy in nats (N,), fp32, of the next-token distribution at each position; inputs, gradients and errors as for
    `token_logprobs`.
    """
    return _per_token(hidden_ND, weight_VD, _Entropy(softcap))


def _per_token(hidden_ND: Tensor, weight_VD: Tensor, measure: _Measure) -> Tensor:
    _check(hidden_ND, weight_VD)
    return cast("Tensor", _PerToken.apply(hidden_ND, weight_VD, measure))  # type: ignore[no-untyped-call]


@one_kernel
def _entropies(raw_CV: Tensor, softcap: float | None) -> Tensor:
    """The entropy (C,), fp32, of logits as the product gives them."""
    logprob_CV = torch.log_softmax(_capped(raw_CV, softcap), dim=-1)
    return -(logprob_CV.exp() * logprob_CV).sum(-1)


@one_kernel
def _entropy_slopes(raw_CV: Tensor, softcap: float | None, weight_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """The entropy, and its derivatives, with softcap and weight."""
    logits_CV = _capped(raw_CV, softcap)
    logprob_CV = torch.log_softmax(logits_CV, dim=-1)
    chance_CV = logprob_CV.exp()
    entropy_C1 = -(chance_CV * logprob_CV).sum(-1, keepdim=True)
    slope_CV = chance_CV.mul_(logprob_CV.add_(entropy_C1)).neg_()
    if softcap is not None:
        slope_CV = slope_CV.mul_(1.0 - (logits_CV / softcap).square())
    if weight_C is not None:
        slope_CV = slope_CV.mul_(weight_C[:, None])
    return entropy_C1.squeeze(1), slope_CV.to(raw_CV.dtype)
