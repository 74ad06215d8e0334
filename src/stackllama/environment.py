"""The machine: what decides bits beside recipe and data (versions, threads, processor features), and its memory."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("stackllama", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
OPTIONAL_PACKAGES = ("bitsandbytes",)
"""Packages that decide bits where they are used, and may be missing."""
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def environment(threads: int, accelerator: str | None) -> dict[str, Any]:
    """The versions, the thread count, the processor and the GPU in use, as they are noted in a run's lineage."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in (*PACKAGES, *OPTIONAL_PACKAGES) if (version := package_version(name))},
        "threads": threads,
        "processor": processor(),
        "features": processor_features(),
        "accelerator": accelerator,
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two environments, such as `torch was 2.12.0 and is 2.13.0`."""
    before, after = ({**env, **env.get("packages", {})} for env in (then, now))
    for key in after:
        if key != "packages" and before.get(key) != after[key]:
            yield f"{key} was {before.get(key)} and is {after[key]}"


def package_version(name: str) -> str | None:
    """The installed version of a package, None where it is missing; the package is not imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name."""
    return next(_cpuinfo("model name"), "") or platform.processor() or platform.machine()


def processor_features() -> list[str]:
    """Which of FEATURES the processor has; empty where the system does not say."""
    line = next(_cpuinfo("flags"), "") or next(_cpuinfo("Features"), "")
    return [name for name in FEATURES if name in line.split()]


def available_memory() -> int:
    """Bytes that this process may have in all: what it holds, what is free, and no more than its limits allow."""
    held = psutil.Process().memory_info()
    found = [psutil.virtual_memory().available + held.rss]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = limit.read_text("utf-8").strip() if limit.is_file() else ""
        found += [int(text)] if text.isdigit() else []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:  # it counts addresses, also those behind which there is no memory
        found.append(soft - (held.vms - held.rss))
    return max(0, min(found))


def _cpuinfo(key: str) -> Iterator[str]:
    path = Path("/proc/cpuinfo")
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()
