"""Elementwise work on CUDA as one kernel each, made by torch.compile; on the CPU it stays as it is written, since
compiling takes longer there than it saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
MOST_KERNELS = 64
"""Kernels of one function (row lengths, shapes, precisions); torch's own limit of 8 is met by ordinary runs, and beyond
it the function runs uncompiled."""


def one_kernel(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
    """The function, compiled where its first argument, a tensor, is on CUDA."""

    @functools.wraps(function)
    def either(*args: P.args, **kwargs: P.kwargs) -> ResultT:
        first = args[0]
        on_cuda = isinstance(first, Tensor) and first.is_cuda
        return (compiled(function) if on_cuda else function)(*args, **kwargs)

    return either


@functools.cache
def compiled(function: Callable[P, ResultT], *, dynamic: bool | None = None) -> Callable[P, ResultT]:
    """The function compiled, once; `dynamic` as torch.compile has it."""
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, MOST_KERNELS)
    return torch.compile(function, dynamic=dynamic)
