"""Linear layers whose frozen weights take 4 bits each: what QLoRA trains its adapters on.

A weight is cut, row after row, into blocks of 64 numbers. A number is kept as the nearest of 16 levels times its
block's scale; the levels, "NormalFloat4", are quantiles of a normal distribution. The scales are kept in 8 bits, as
dynamic numbers times a scale for each 256 of them, about their mean ("double quantization"). In all that is

    1/2 + 1/64 + 4 / (64 * 256) = 0.516 bytes a number.

The kernels are those of bitsandbytes, which also work on the CPU. Its own `Linear4bit` is left out: on some processors
its forward lays the packed weight out anew, in place, and every other reader of it then finds other numbers.

Unpacking and packing again gives the same levels but other scales, so what was packed is not what one would pack of it:
whoever needs the same bits again packs the original weights.

Legend: N tokens, D input features, O output features.

Source: Dettmers et al. 2023, "QLoRA: efficient finetuning of quantized LLMs", section 3.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stackllama.errors import ModelError
from stackllama.model.fused import Given, Layer, linears

BLOCK = 64
"""Numbers that share a scale."""
SCALES_BLOCK = 256
"""Scales that share a scale."""


class NF4Linear(nn.Linear):
    """A frozen linear layer with its weight in NF4, made of one with a dense weight and without changing that.

    It is an `nn.Linear` so that peft puts adapters on it as on any other. `weight` is the packed one, two numbers a
    byte; `dense` gives the numbers. device: where it is packed, and stays.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed, state = _bitsandbytes().quantize_4bit(
            linear.weight.detach().to(device), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
        assert state.state2.blocksize == SCALES_BLOCK, "bitsandbytes has changed its double quantization"
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scales", state.absmax)
        self.register_buffer("scales_scales", state.state2.absmax)
        self.register_buffer("scales_levels", state.state2.code)
        self.register_buffer("scales_mean", state.offset)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, D), unpacked."""
        library = _bitsandbytes()
        scales = library.QuantState(
            self.scales_scales, code=self.scales_levels, blocksize=SCALES_BLOCK, dtype=torch.float32
        )
        state = library.QuantState(
            self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.scales_mean,
            state2=scales,
        )
        weight_OD: Tensor = library.dequantize_4bit(self.weight, state)
        return weight_OD

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear calls it
        """X W' + b of inputs (..., D), in their precision or in that of autocast; differentiable in the inputs."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        bias_O = None if self.bias is None else self.bias.to(dtype)
        (output_NO,) = linears(Given(), (input.flatten(0, -2).to(dtype),), [Layer(self, bias_O)])
        return output_NO.unflatten(0, input.shape[:-1])


def quantize(model: PreTrainedModel, device: torch.device) -> None:
    """Put the weights of all linear layers of a model's decoder into NF4, in place; embeddings, norms, biases and the
    output matrix stay as they are.

    One layer after the other goes to `device`, is packed there and gives its dense weight back, so that neither all
    dense weights need to fit on the device nor are both kinds of all layers ever there.

    Raises:
        ModelError: when bitsandbytes is not installed.
    """
    check_installed()
    decoder = model.base_model
    for name in [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]:
        decoder.set_submodule(name, NF4Linear(decoder.get_submodule(name), device))
    # Loaded weights lie in their files, mapped: while one of them does, the pages of all that were read stay.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of a model is in NF4."""
    return any(isinstance(module, NF4Linear) for module in model.modules())


def check_installed() -> None:
    """Raise ModelError where bitsandbytes is not installed; it is not imported, which takes seconds."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "4-bit weights (base.quantization: nf4) need the package bitsandbytes, which is not installed: "
            "pip install 'stackllama[qlora]'"
        )


def _bitsandbytes() -> Any:
    from bitsandbytes import functional

    return functional
