"""Log-probabilities, and losses of them, without ever storing (tokens x vocabulary) logits.

Hidden states meet the output matrix chunk by chunk; each chunk's logits become log-probabilities and entropies (and,
where gradients are on, slopes) and are thrown away. A chunk holds ``CHUNK_ELEMENTS`` logits at most.

Legend: N scored positions, D hidden size, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from stackllama.model.kernels import one_kernel

CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""By device: a GPU multiplies small matrices below its rate."""

TokenLoss = Callable[[slice, Tensor, Tensor], Tensor]
"""The losses (C,) of some tokens, from their place among all, log-probabilities (C,) and entropies (C,); each depends
on its own token alone."""


def _chunks(count: int, weight_VD: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS[weight_VD.device.type] // len(weight_VD))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class _PerToken(torch.autograd.Function):
    """Log-probabilities of labels under the logits h W', with gradients to h and, where it is trained, to W.

    Under a frozen W the slopes by h are worked out while a chunk's logits are at hand, and kept; under a trained one
    its gradient needs the weight of each token, so the backward computes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, softcap: float | None) -> Tensor:
        logprob_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        frozen = not ctx.needs_input_grad[1]
        slope_ND = torch.empty_like(hidden_ND) if frozen and ctx.needs_input_grad[0] else None
        for part in _chunks(len(hidden_ND), weight_VD):
            raw_CV = linear(hidden_ND[part], weight_VD)
            logprob_CV, logprob_N[part] = _label_logprobs(raw_CV, label_N[part], softcap)
            if slope_ND is not None:
                ones_C = torch.ones_like(logprob_N[part])
                torch.mm(_slopes(raw_CV, logprob_CV, label_N[part], ones_C, softcap), weight_VD, out=slope_ND[part])
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
        gradient = _Gradient.zero(hidden_ND, weight_VD)
        for part in _chunks(len(hidden_ND), weight_VD):
            raw_CV = linear(hidden_ND[part], weight_VD)
            logprob_CV, _ = _label_logprobs(raw_CV, label_N[part], ctx.softcap)
            slope_CV = _slopes(raw_CV, logprob_CV, label_N[part], grad_N[part], ctx.softcap)
            gradient.add(part, slope_CV, hidden_ND, weight_VD)
        return gradient.hidden_ND, cast("Tensor", gradient.weight_VD).to(weight_VD.dtype), None, None


@dataclass(frozen=True, slots=True)
class _Gradient:
    """Gradients by the hidden states and, where it is trained, by the output matrix (in fp32), chunk by chunk."""

    hidden_ND: Tensor
    weight_VD: Tensor | None

    @classmethod
    def zero(cls, hidden_ND: Tensor, weight_VD: Tensor, *, trained: bool = True) -> _Gradient:
        grown = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device) if trained else None
        return cls(torch.empty_like(hidden_ND), grown)

    def add(self, part: slice, slope_CV: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> None:
        """Take in the slopes of a chunk's logits."""
        torch.mm(slope_CV, weight_VD, out=self.hidden_ND[part])
        if self.weight_VD is None:
            return
        if slope_CV.dtype == torch.float32:
            self.weight_VD.addmm_(slope_CV.T, hidden_ND[part])
        else:
            self.weight_VD.add_(slope_CV.T @ hidden_ND[part])


class _SummedLoss(torch.autograd.Function):
    """The sum of a loss of each token, with its gradients worked out while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        label_N: Tensor,
        loss: TokenLoss,
        softcap: float | None,
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprob_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        entropy_N = torch.zeros_like(logprob_N)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        gradient = _Gradient.zero(hidden_ND, weight_VD, trained=ctx.needs_input_grad[1])
        for part in _chunks(len(hidden_ND), weight_VD):
            raw_CV = linear(hidden_ND[part], weight_VD)
            logprob_CV, logprob_N[part] = _label_logprobs(raw_CV, label_N[part], softcap)
            if with_entropies:
                entropy_N[part] = _entropies(logprob_CV)
            loss_C, by_logprob_C, by_entropy_C = _differentiated(loss, part, logprob_N[part], entropy_N[part])
            total += loss_C.sum()
            if not any(ctx.needs_input_grad[:2]):
                continue
            if by_entropy_C is None:
                slope_CV = _slopes(raw_CV, logprob_CV, label_N[part], by_logprob_C, softcap)
            else:
                slope_CV = _slopes_with_entropy(
                    raw_CV, logprob_CV, label_N[part], by_logprob_C, by_entropy_C, entropy_N[part], softcap
                )
            gradient.add(part, slope_CV, hidden_ND, weight_VD)
        ctx.save_for_backward(gradient.hidden_ND, gradient.weight_VD)
        ctx.dtype = weight_VD.dtype
        ctx.mark_non_differentiable(logprob_N, entropy_N)
        return total, logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        grad = grad_outputs[0]
        by_weight = None if d_weight is None else (d_weight * grad).to(ctx.dtype)
        return (d_hidden * grad).to(d_hidden.dtype), by_weight, None, None, None, None


def _differentiated(
    loss: TokenLoss, part: slice, logprob_C: Tensor, entropy_C: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The losses of a chunk's tokens, and their derivatives by log-probability and by entropy (None where a loss does
    not look at it).
    """
    known = [logprob_C.detach().clone().requires_grad_(), entropy_C.detach().clone().requires_grad_()]
    with torch.enable_grad():
        loss_C = loss(part, *known)
        by_logprob_C, by_entropy_C = torch.autograd.grad(loss_C.sum(), known, allow_unused=True)
    return loss_C.detach(), torch.zeros_like(logprob_C) if by_logprob_C is None else by_logprob_C, by_entropy_C


@one_kernel
def _label_logprobs(raw_CV: Tensor, label_C: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The log p[v] (C, V) and log p[label] (C,), fp32, of logits as the product gives them."""
    logprob_CV = torch.log_softmax(_capped(raw_CV, softcap), dim=-1)
    return logprob_CV, logprob_CV.gather(1, label_C[:, None]).squeeze(1)


@one_kernel
def _entropies(logprob_CV: Tensor) -> Tensor:
    """The entropy (C,), fp32."""
    return -torch.linalg.vecdot(logprob_CV.exp(), logprob_CV)


@one_kernel
def _slopes(raw_CV: Tensor, logprob_CV: Tensor, label_C: Tensor, weight_C: Tensor, softcap: float | None) -> Tensor:
    """The derivatives of weight * log p[label] by the logits before any softcap, weight * ([v = label] - p[v]), in the
    logits' precision; logprob_CV is used up.
    """
    own_C1 = weight_C[:, None] * (1.0 - logprob_CV.gather(1, label_C[:, None]).exp())
    slope_CV = logprob_CV.exp_().mul_(-weight_C[:, None]).scatter_(1, label_C[:, None], own_C1)
    return _uncapped(slope_CV, raw_CV, softcap)


@one_kernel
def _slopes_with_entropy(
    raw_CV: Tensor,
    logprob_CV: Tensor,
    label_C: Tensor,
    weight_C: Tensor,
    entropy_weight_C: Tensor,
    entropy_C: Tensor,
    softcap: float | None,
) -> Tensor:
    """The same of weight * log p[label] + entropy_weight * H: beside what `_slopes` gives,
    -entropy_weight * p[v] (log p[v] + H).
    """
    own_C1 = logprob_CV.gather(1, label_C[:, None])
    chance_C1 = own_C1.exp()
    own_C1 = weight_C[:, None] * (1.0 - chance_C1) - entropy_weight_C[:, None] * chance_C1 * (
        own_C1 + entropy_C[:, None]
    )
    chance_CV = logprob_CV.exp()
    slope_CV = logprob_CV.add_(entropy_C[:, None]).mul_(entropy_weight_C[:, None]).add_(weight_C[:, None])
    slope_CV = slope_CV.mul_(chance_CV).neg_().scatter_(1, label_C[:, None], own_C1)
    return _uncapped(slope_CV, raw_CV, softcap)


def _capped(raw_CV: Tensor, softcap: float | None) -> Tensor:
    """Logits in fp32; ``softcap`` bounds them by cap * tanh(logit / cap), as Gemma 2 does."""
    logits_CV = raw_CV.float()
    return logits_CV if softcap is None else logits_CV.div(softcap).tanh_().mul_(softcap)


def _uncapped(slope_CV: Tensor, raw_CV: Tensor, softcap: float | None) -> Tensor:
    """Derivatives by the logits before the softcap, of those behind it, in the logits' precision."""
    if softcap is not None:
        slope_CV = slope_CV.mul_(1.0 - (_capped(raw_CV, softcap) / softcap).square())
    return slope_CV.to(raw_CV.dtype)


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Log-probability in nats (N,), fp32, of each label under softmax(hidden W').

    hidden_ND and weight_VD share one precision (bf16 products are summed in fp32 by the kernel); differentiable in
    both.

    Raises:
        ValueError: when the precisions or the shapes do not fit.
    """
    _check(hidden_ND, weight_VD)
    return cast("Tensor", _PerToken.apply(hidden_ND, weight_VD, label_N, softcap))  # type: ignore[no-untyped-call]


def summed_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    loss: TokenLoss,
    *,
    softcap: float | None = None,
    with_entropies: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (), fp32, of a loss of each token, and each token's log-probability and entropy in nats (N,), fp32.

    The sum alone can be differentiated; that costs no second product with the output matrix, since its gradients are
    worked out with the logits (a loss that is no sum over tokens needs `token_logprobs`). Without `with_entropies`
    entropies are 0. Inputs and errors as for `token_logprobs`.
    """
    _check(hidden_ND, weight_VD)
    if not torch.is_grad_enabled():  # the function itself cannot see that, and would work out what nobody asks for
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    found = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, label_N, loss, softcap, with_entropies
    )
    return cast("tuple[Tensor, Tensor, Tensor]", found)


def _check(hidden_ND: Tensor, weight_VD: Tensor) -> None:
    if hidden_ND.dtype != weight_VD.dtype or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden states {tuple(hidden_ND.shape)} {hidden_ND.dtype} and output matrix {tuple(weight_VD.shape)} "
            f"{weight_VD.dtype} do not fit; cast the hidden states to the matrix's precision"
        )
