"""Linear layers together with what makes their input, as one operator with its own backward.

Three things feed the linear layers of a Llama: a norm of the residual stream (queries, keys, values; gate and up), a
gate (down), and the attention's output. Autograd would keep the input of each step for its backward. `linears` keeps
what the input is made from, which is kept anyway, and makes it again; several layers on one input share the products
with their adapters and add into one gradient; and nothing passes over memory that a matrix product can do on its way.

Legend: N tokens, D input features, O output features, F features between gate and down, R ranks of all adapters on one
input, H heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


class Made(Protocol):
    """How the input of linear layers is made from `sources`, and the gradients of these from its gradient."""

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What it is made from."""

    def make(self, *sources: Tensor) -> Tensor:
        """The input (N, D)."""

    def backward(self, grad_ND: Tensor, wanted: Sequence[bool], /, *sources: Tensor) -> tuple[Tensor | None, ...]:
        """A gradient for each source that is wanted."""


@dataclass(frozen=True, slots=True)
class Given:
    """An input (N, D) as it is."""

    sources: tuple[Tensor]

    def make(self, *sources: Tensor) -> Tensor:
        """Itself."""
        return sources[0]

    def backward(self, grad_ND: Tensor, _: Sequence[bool], /, *__: Tensor) -> tuple[Tensor | None, ...]:
        """Itself."""
        return (grad_ND,)


@dataclass(frozen=True, slots=True)
class Normed:
    """hidden / rms(hidden) * weight, worked out in fp32 and rounded once to `dtype`; hidden is (N, D), weight (D,).

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization", eq. 4.
    """

    sources: tuple[Tensor, Tensor]
    eps: float
    dtype: torch.dtype

    def _inverse(self, hidden_ND: Tensor) -> Tensor:
        square_N1 = torch.linalg.vector_norm(hidden_ND, dim=-1, keepdim=True, dtype=torch.float32).square_()
        return square_N1.div_(hidden_ND.shape[-1]).add_(self.eps).rsqrt_()

    def make(self, *sources: Tensor) -> Tensor:
        """The input (N, D)."""
        hidden_ND, weight_D = sources
        return (hidden_ND * self._inverse(hidden_ND)).mul_(weight_D).to(self.dtype)

    def backward(self, grad_ND: Tensor, wanted: Sequence[bool], /, *sources: Tensor) -> tuple[Tensor | None, ...]:
        """With u = hidden / rms: d weight = sum grad u; d hidden = (g - u mean(g u)) / rms where g = grad weight."""
        hidden_ND, weight_D = sources
        inverse_N1 = self._inverse(hidden_ND)
        unit_ND = hidden_ND * inverse_N1
        weighted_ND = grad_ND * weight_D.float()
        d_weight = (grad_ND * unit_ND).sum(0).to(weight_D.dtype) if wanted[1] else None
        if not wanted[0]:
            return None, d_weight
        share_N1 = torch.linalg.vecdot(weighted_ND, unit_ND).div_(hidden_ND.shape[-1]).unsqueeze_(-1)
        d_hidden = weighted_ND.sub_(unit_ND.mul_(share_N1)).mul_(inverse_N1)
        return d_hidden.to(hidden_ND.dtype), d_weight


@dataclass(frozen=True, slots=True)
class Gated:
    """silu(gate) * up, both (N, F). Source: Shazeer 2020, "GLU variants improve transformer", eq. 6."""

    sources: tuple[Tensor, Tensor]

    def make(self, *sources: Tensor) -> Tensor:
        """The input (N, F)."""
        gate_NF, up_NF = sources
        return silu(gate_NF).mul_(up_NF)

    def backward(self, grad_ND: Tensor, _: Sequence[bool], /, *sources: Tensor) -> tuple[Tensor | None, ...]:
        """With s = sigmoid(gate): d up = grad gate s; d gate = grad up s (1 + gate (1 - s))."""
        gate_NF, up_NF = sources
        d_gate = torch.ops.aten.silu_backward(grad_ND * up_NF, gate_NF)
        return d_gate, silu(gate_NF).mul_(grad_ND)


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: its weight and bias, and the adapters on it as one, scaled: up after down. None: it has none."""

    weight_OD: Tensor
    bias_O: Tensor | None
    up_OR: Tensor | None = None
    down_RD: Tensor | None = None


def linears(made: Made, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """The outputs (N, O) of linear layers with their adapters on one input; differentiable in the input's sources, the
    weights, the biases and the adapters. Everything but the sources is in one precision.
    """
    adapted = [layer for layer in layers if layer.up_OR is not None]
    downs = [layer.down_RD for layer in adapted if layer.down_RD is not None]
    down_RD = torch.cat(downs) if downs else None
    tensors = (*made.sources, down_RD, *(part for one in layers for part in (one.weight_OD, one.bias_O, one.up_OR)))
    bare, own = _without_sources(made), len(made.sources)
    return cast("tuple[Tensor, ...]", _Linears.apply(bare, own, len(layers), *tensors))  # type: ignore[no-untyped-call]


def _without_sources(made: Made) -> Made:
    """How the input is made, alone. A graph's node lives as long as its loss does: sources that stood in it would be
    kept after its backward, when what autograd saved is long gone.
    """
    bare: Made = replace(cast("Any", made), sources=())
    return bare


class _Linears(torch.autograd.Function):
    """x W' + b + (x down') up' for every layer, where x is made and thrown away."""

    @staticmethod
    def forward(ctx: Any, made: Made, own: int, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        sources, down_RD, parts = tensors[:own], tensors[own], tensors[own + 1 :]
        input_ND = made.make(*cast("tuple[Tensor, ...]", sources))
        low_NR = None if down_RD is None else linear(input_ND, down_RD)
        outputs = []
        start = 0
        for weight_OD, bias_O, up_OR in _by_layer(parts, count):
            output_NO = linear(input_ND, weight_OD, bias_O)
            if up_OR is not None and low_NR is not None:
                rank = up_OR.shape[1]
                output_NO.addmm_(low_NR[:, start : start + rank], up_OR.T)
                start += rank
            outputs.append(output_NO)
        ctx.save_for_backward(*tensors, low_NR)
        ctx.made, ctx.count, ctx.sources = made, count, own
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, low_NR = ctx.saved_tensors
        own: int = ctx.sources
        wanted: Sequence[bool] = ctx.needs_input_grad[3:]
        sources, down_RD, parts = tensors[:own], tensors[own], tensors[own + 1 :]
        layers = list(_by_layer(parts, ctx.count))
        wanted_by_layer = list(_by_layer(wanted[own + 1 :], ctx.count))
        anything = wanted[own] or any(weight for weight, _, _ in wanted_by_layer)
        input_ND = ctx.made.make(*sources) if anything else None
        bounds = [0]
        for _, _, up_OR in layers:
            bounds.append(bounds[-1] + (0 if up_OR is None else up_OR.shape[1]))
        d_low = None if down_RD is None else torch.empty_like(low_NR)
        d_input: Tensor | None = None
        d_parts: list[Tensor | None] = []
        for (weight_OD, _, up_OR), (weight, bias, up), (start, stop), grad_NO in zip(
            layers, wanted_by_layer, pairwise(bounds), grads, strict=True
        ):
            if any(wanted[:own]):
                d_input = grad_NO @ weight_OD if d_input is None else d_input.addmm_(grad_NO, weight_OD)
            if up_OR is not None and d_low is not None:
                torch.mm(grad_NO, up_OR, out=d_low[:, start:stop])
            d_parts += [
                grad_NO.T @ input_ND if weight and input_ND is not None else None,
                grad_NO.sum(0) if bias else None,
                grad_NO.T @ low_NR[:, start:stop] if up else None,
            ]
        d_down = d_low.T @ input_ND if d_low is not None and input_ND is not None and wanted[own] else None
        if d_input is None:
            return None, None, None, *[None] * own, d_down, *d_parts
        if d_low is not None:
            d_input.addmm_(d_low, down_RD)
        return None, None, None, *ctx.made.backward(d_input, wanted[:own], *sources), d_down, *d_parts


def made_input(made: Made) -> Tensor:
    """The input (N, D) itself, differentiable in its sources."""
    return cast("Tensor", _Input.apply(_without_sources(made), *made.sources))  # type: ignore[no-untyped-call]


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Made, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        ctx.made = made
        return made.make(*sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.made.backward(grads[0], ctx.needs_input_grad[1:], *ctx.saved_tensors)


def _by_layer(parts: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Weight, bias and up of each layer."""
    return [parts[3 * at : 3 * at + 3] for at in range(count)]


class _Rotated(torch.autograd.Function):
    """Each pair of features (i, i + E / 2) turned by its angle; the backward turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, heads_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NE, sin_NE)
        return _turn(heads_NHE, cos_NE, sin_NE, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_NE, sin_NE = ctx.saved_tensors
        return _turn(grads[0], cos_NE, sin_NE, back=True), None, None


def _turn(heads_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor, *, back: bool) -> Tensor:
    half = heads_NHE.shape[-1] // 2
    cos_N1E, sin_N1E = cos_NE[:, None, :half], sin_NE[:, None, :half]  # both halves are the same
    first, second = heads_NHE[..., :half], heads_NHE[..., half:]
    turned = torch.empty(heads_NHE.shape, dtype=heads_NHE.dtype, device=heads_NHE.device)
    sign = -1.0 if back else 1.0
    torch.mul(first, cos_N1E, out=turned[..., :half]).addcmul_(second, sin_N1E, value=-sign)
    torch.mul(second, cos_N1E, out=turned[..., half:]).addcmul_(first, sin_N1E, value=sign)
    return turned


def rotated(heads_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Queries or keys (N, H, E) with their positions. Source: Su et al. 2021, "RoFormer", eq. 34, with the pairs half a
    head apart, as Llama has them.
    """
    return cast("Tensor", _Rotated.apply(heads_NHE, cos_NE, sin_NE))  # type: ignore[no-untyped-call]
