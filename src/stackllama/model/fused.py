"""Linear layers together with what makes their input, as one operator with its own backward.

Three things feed the linear layers of a Llama: a norm of the residual stream (queries, keys, values; gate and up), a
gate (down), and the attention's output. Autograd would keep the input of each step for its backward. `linears` keeps
what the input is made from, which is kept anyway, and makes it again; several layers on one input share the products
with their adapters and add into one gradient; and nothing passes over memory that a matrix product can do on its way.
A weight that is kept packed (4-bit, `nf4.py`) is unpacked for each product with it and thrown away.

Legend: N tokens, D input features, O output features, F features between gate and down, R ranks of all adapters on one
input, H heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from stackllama.model.kernels import one_kernel

Gradients = tuple[Tensor | None, tuple[Tensor | None, ...]]
"""The input (N, D), made again, and what its sources get."""


class Made(Protocol):
    """How the input of linear layers is made from its sources, and their gradients from its gradient."""

    def make(self, *sources: Tensor) -> Tensor:
        """The input (N, D)."""

    def backward(self, grad_ND: Tensor, wanted: Sequence[bool], /, *sources: Tensor, again: bool) -> Gradients:
        """A gradient for each source that is wanted, and, where it is needed `again`, the input."""


@dataclass(frozen=True, slots=True)
class Given:
    """The one source (N, D) as it is."""

    def make(self, *sources: Tensor) -> Tensor:
        """Itself."""
        return sources[0]

    def backward(self, grad_ND: Tensor, _: Sequence[bool], /, *sources: Tensor, again: bool) -> Gradients:
        """The gradient itself."""
        return sources[0] if again else None, (grad_ND,)


@dataclass(frozen=True, slots=True)
class Normed:
    """hidden / rms(hidden) * weight of hidden (N, D) and weight (D,), worked out in fp32 and rounded once to `dtype`.

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization", eq. 4.
    """

    eps: float
    dtype: torch.dtype

    def make(self, *sources: Tensor) -> Tensor:
        """The input (N, D)."""
        hidden_ND, weight_D = sources
        return _normed(hidden_ND, weight_D, self.eps, self.dtype)

    def backward(self, grad_ND: Tensor, wanted: Sequence[bool], /, *sources: Tensor, again: bool) -> Gradients:
        """With u = hidden / rms: d weight = sum grad u; d hidden = (g - u mean(g u)) / rms where g = grad weight."""
        hidden_ND, weight_D = sources
        dtype = self.dtype if again else None
        input_ND, *found = _normed_gradients(grad_ND, hidden_ND, weight_D, self.eps, wanted[0], wanted[1], dtype)
        return input_ND, tuple(found)


@one_kernel
def _normed(hidden_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return (hidden_ND * _inverse_rms(hidden_ND, eps)).mul_(weight_D).to(dtype)


@one_kernel
def _normed_gradients(
    grad_ND: Tensor,
    hidden_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    hidden: bool,
    weight: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is normed, in `dtype` if there is one, and the gradients of hidden and weight that are wanted."""
    inverse_N1 = _inverse_rms(hidden_ND, eps)
    unit_ND = hidden_ND * inverse_N1
    input_ND = None if dtype is None else (unit_ND * weight_D).to(dtype)
    d_weight = (grad_ND * unit_ND).sum(0).to(weight_D.dtype) if weight else None
    if not hidden:
        return input_ND, None, d_weight
    weighted_ND = grad_ND * weight_D.float()
    share_N1 = torch.linalg.vecdot(weighted_ND, unit_ND).div_(hidden_ND.shape[-1]).unsqueeze_(-1)
    d_hidden = weighted_ND.sub_(unit_ND.mul_(share_N1)).mul_(inverse_N1)
    return input_ND, d_hidden.to(hidden_ND.dtype), d_weight


def _inverse_rms(hidden_ND: Tensor, eps: float) -> Tensor:
    square_N1 = torch.linalg.vector_norm(hidden_ND, dim=-1, keepdim=True, dtype=torch.float32).square_()
    return square_N1.div_(hidden_ND.shape[-1]).add_(eps).rsqrt_()


@dataclass(frozen=True, slots=True)
class Gated:
    """silu(gate) * up of gate and up (N, F). Source: Shazeer 2020, "GLU variants improve transformer", eq. 6."""

    def make(self, *sources: Tensor) -> Tensor:
        """The input (N, F)."""
        gate_NF, up_NF = sources
        return _gated(gate_NF, up_NF)

    def backward(self, grad_ND: Tensor, _: Sequence[bool], /, *sources: Tensor, again: bool) -> Gradients:
        """With s = sigmoid(gate): d up = grad gate s; d gate = grad up s (1 + gate (1 - s))."""
        gate_NF, up_NF = sources
        input_NF, *found = _gated_gradients(grad_ND, gate_NF, up_NF, again)
        return input_NF, tuple(found)


@one_kernel
def _gated(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    return silu(gate_NF).mul_(up_NF)


@one_kernel
def _gated_gradients(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, again: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """What is gated, if it is needed again, and the gradients of gate and up."""
    d_gate = torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF)
    opened_NF = silu(gate_NF)
    d_up = opened_NF * grad_NF
    return opened_NF.mul_(up_NF) if again else None, d_gate, d_up


class Packed(Protocol):
    """A weight that is kept in fewer bits than the products use, and is never trained."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, D), made anew in each call."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer: its weight, its bias or None, and by name the adapters on it: up (O, R), down (R, D), and by what
    their product counts.
    """

    weight_OD: Tensor | Packed
    bias_O: Tensor | None
    adapters: Mapping[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)


def linears(made: Made, sources: Sequence[Tensor], layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """The outputs (N, O) of linear layers with their adapters on one input; differentiable in the input's sources, the
    weights that are not packed, the biases and the adapters. Everything but the sources is in one precision, in which
    packed weights are unpacked.

    Each adapter is added by itself, in the order of the names: one that adds zeros changes no bit.
    """
    names = list(dict.fromkeys(name for layer in layers for name in layer.adapters))
    downs = [torch.cat([one.adapters[name][1] for one in layers if name in one.adapters]) for name in names]
    parts: list[Tensor | None] = []
    packed: list[Packed | None] = []
    scales: list[list[float]] = []
    for layer in layers:
        weight_OD = layer.weight_OD if isinstance(layer.weight_OD, Tensor) else None
        packed.append(None if isinstance(layer.weight_OD, Tensor) else layer.weight_OD)
        scales.append([layer.adapters[name][2] if name in layer.adapters else 0.0 for name in names])
        ups = [layer.adapters[name][0] if name in layer.adapters else None for name in names]
        parts += [weight_OD, layer.bias_O, *ups]
    counts = _Counts(len(sources), len(names), scales, packed)
    found = _Linears.apply(made, counts, *sources, *downs, *parts)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, ...]", found)


@dataclass(frozen=True, slots=True)
class _Counts:
    """How many of the tensors that `_Linears` is given are sources and adapters; the rest goes by layer. `scales` has a
    number for each layer and adapter, `packed` the weight of each layer whose weight is not among the tensors.
    """

    sources: int
    adapters: int
    scales: Sequence[Sequence[float]]
    packed: Sequence[Packed | None]

    def parted(self, given: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], list[Sequence[Any]]]:
        """Sources, downs, and of each layer its weight, its bias and its ups."""
        start = self.sources + self.adapters
        step = 2 + self.adapters
        by_layer = [given[at : at + step] for at in range(start, len(given), step)]
        return given[: self.sources], given[self.sources : start], by_layer


class _Linears(torch.autograd.Function):
    """x W' + b + (x down') up' for every layer and adapter, where x is made and thrown away."""

    @staticmethod
    def forward(ctx: Any, made: Made, counts: _Counts, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        sources, downs, by_layer = counts.parted(tensors)
        input_ND = made.make(*sources)
        lows = [linear(input_ND, down_RD) for down_RD in downs]
        outputs = []
        places = _places(by_layer, counts.adapters)
        layers = zip(by_layer, counts.packed, places, counts.scales, strict=True)
        for (weight_OD, bias_O, *ups), packed, columns, scales in layers:
            output_NO = linear(input_ND, _dense(weight_OD, packed, input_ND.dtype), bias_O)
            for low_NR, up_OR, some, scale in zip(lows, ups, columns, scales, strict=True):
                if up_OR is not None:
                    output_NO.addmm_(low_NR[:, some], up_OR.T, alpha=scale)
            outputs.append(output_NO)
        ctx.save_for_backward(*tensors, *lows)
        ctx.made, ctx.counts = made, counts
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        counts: _Counts = ctx.counts
        saved = ctx.saved_tensors
        tensors, lows = saved[: len(saved) - counts.adapters], saved[len(saved) - counts.adapters :]
        sources, downs, by_layer = counts.parted(tensors)
        wanted_sources, wanted_downs, wanted_by_layer = counts.parted(ctx.needs_input_grad[2:])
        places = _places(by_layer, counts.adapters)
        d_lows, d_ups = _adapter_gradients(by_layer, wanted_by_layer, places, counts.scales, lows, grads)
        again = any(wanted_downs) or any(wanted[0] for wanted in wanted_by_layer)
        input_ND: Tensor | None = None
        d_sources: Sequence[Tensor | None] = [None] * counts.sources
        if any(wanted_sources):
            d_input = _input_gradient(by_layer, counts.packed, grads, d_lows, downs)
            input_ND, d_sources = ctx.made.backward(d_input, wanted_sources, *sources, again=again)
        elif again:
            input_ND = ctx.made.make(*sources)
        d_parts: list[Tensor | None] = []
        for (weight, bias, *_), grad_NO, found in zip(wanted_by_layer, grads, d_ups, strict=True):
            d_weight = grad_NO.T @ input_ND if weight and input_ND is not None else None
            d_parts += [d_weight, grad_NO.sum(0) if bias else None, *found]
        d_downs = [
            d_low.T @ input_ND if down and input_ND is not None else None
            for d_low, down in zip(d_lows, wanted_downs, strict=True)
        ]
        return None, None, *d_sources, *d_downs, *d_parts


def _adapter_gradients(
    by_layer: Sequence[Sequence[Any]],
    wanted_by_layer: Sequence[Sequence[bool]],
    places: Sequence[Sequence[slice]],
    scales: Sequence[Sequence[float]],
    lows: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """Gradients of what lies between down and up (N, R), by adapter; and of the ups that are wanted, by layer."""
    d_lows = [torch.empty_like(low_NR) for low_NR in lows]
    d_ups: list[list[Tensor | None]] = []
    for (_, _, *ups), (_, _, *wanted), columns, factors, grad_NO in zip(
        by_layer, wanted_by_layer, places, scales, grads, strict=True
    ):
        d_ups.append([])
        for up_OR, up, some, scale, low_NR, d_low in zip(ups, wanted, columns, factors, lows, d_lows, strict=True):
            if up_OR is not None:
                part_NR = d_low[:, some]
                torch.addmm(part_NR, grad_NO, up_OR, beta=0, alpha=scale, out=part_NR)
            d_up = torch.addmm(up_OR, grad_NO.T, low_NR[:, some], beta=0, alpha=scale) if up else None
            d_ups[-1].append(d_up)
    return d_lows, d_ups


def _input_gradient(
    by_layer: Sequence[Sequence[Any]],
    packed: Sequence[Packed | None],
    grads: Sequence[Tensor],
    d_lows: Sequence[Tensor],
    downs: Sequence[Tensor],
) -> Tensor:
    """The gradient of the input (N, D), through all weights and all adapters."""
    d_input: Tensor | None = None
    for (weight_OD, *_), kept, grad_NO in zip(by_layer, packed, grads, strict=True):
        dense_OD = _dense(weight_OD, kept, grad_NO.dtype)
        d_input = grad_NO @ dense_OD if d_input is None else d_input.addmm_(grad_NO, dense_OD)
        del dense_OD  # before the next one is unpacked
    assert d_input is not None, "no layer"
    for d_low, down_RD in zip(d_lows, downs, strict=True):
        d_input.addmm_(d_low, down_RD)
    return d_input


def _dense(weight_OD: Tensor | None, packed: Packed | None, dtype: torch.dtype) -> Tensor:
    if packed is not None:
        return packed.dense(dtype)
    assert weight_OD is not None, "a layer without a weight"
    return weight_OD


def _places(by_layer: Sequence[Sequence[Any]], adapters: int) -> list[list[slice]]:
    """For each layer and adapter, its columns behind the adapter's downs, which lie side by side for all layers."""
    stops = [0] * adapters
    places = []
    for _, _, *ups in by_layer:
        starts = list(stops)
        stops = [stop + (0 if up_OR is None else up_OR.shape[1]) for stop, up_OR in zip(stops, ups, strict=True)]
        places.append([slice(start, stop) for start, stop in zip(starts, stops, strict=True)])
    return places


def made_input(made: Made, sources: Sequence[Tensor]) -> Tensor:
    """The input (N, D) itself, differentiable in its sources."""
    return cast("Tensor", _Input.apply(made, *sources))  # type: ignore[no-untyped-call]


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Made, *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*sources)
        ctx.made = made
        return made.make(*sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, found = ctx.made.backward(grads[0], ctx.needs_input_grad[1:], *ctx.saved_tensors, again=False)
        return None, *found


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


@one_kernel
def _turn(heads_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor, *, back: bool) -> Tensor:
    half = heads_NHE.shape[-1] // 2
    cos_N1E, sin_N1E = cos_NE[:, None, :half], sin_NE[:, None, :half]
    first, second = heads_NHE[..., :half], heads_NHE[..., half:]
    sign = -1.0 if back else 1.0
    turned_first = torch.addcmul(first * cos_N1E, second, sin_N1E, value=-sign)
    turned_second = torch.addcmul(second * cos_N1E, first, sin_N1E, value=sign)
    return torch.cat((turned_first, turned_second), -1)


def rotated(heads_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Queries or keys (N, H, E) with their positions, whose angles (N, E) are the same in both halves.

    Source: Su et al. 2021, "RoFormer", eq. 34, with the pairs half a head apart, as Llama has them.
    """
    assert cos_NE.shape[-1] == sin_NE.shape[-1] == heads_NHE.shape[-1], "a rotation of a part of each head"
    return cast("Tensor", _Rotated.apply(heads_NHE, cos_NE, sin_NE))  # type: ignore[no-untyped-call]
