"""Rates of matrix products on the machine at hand, in FLOP/s: what a share of the peak is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def square(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of products of two square matrices of random numbers."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device)


def of_shapes(shapes: Mapping[tuple[int, int], int], tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the products of so many tokens with weights of (features in, features out), each as often as it is
    told: forward and backward to the input.
    """
    flops = seconds = 0.0
    for (ins, outs), count in sorted(shapes.items()):
        weight = torch.randn(outs, ins, device=device).to(dtype)
        hidden, grad = (torch.randn(tokens, size, device=device).to(dtype) for size in (ins, outs))
        flops += count * 4 * tokens * ins * outs
        seconds += count * _seconds(_both_ways(hidden, weight, grad), device)
    return flops / seconds


def _both_ways(hidden: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    return lambda: (torch.nn.functional.linear(hidden, weight), torch.mm(grad, weight))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run of the work, at best of three; a GPU is given many at once, since starting one takes time."""
    times = []
    count = 20 if device.type == "cuda" else 1
    work()
    for _ in range(3):
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            work()
        wait(device)
        times.append((time.perf_counter() - start) / count)
    return min(times)
