"""What both sides of gpu.py share: random weights made where they will be, the steps' clock, and what a side reports.

A side is a process that is given a job (a file of JSON, see gpu.py) and prints lines that begin with `RESULT`. Nothing
here needs stackllama or TRL.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import flops
import rates
import torch
from gpu import RESULT, WARM
from transformers import LlamaConfig, PreTrainedModel


def read_job() -> dict[str, Any]:
    """The job that this process was given."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    return job


def tell(**found: Any) -> None:
    """Report to gpu.py at once, so that what is known outlives this process."""
    print(RESULT + json.dumps(found), flush=True)


def model_of(kind: type[PreTrainedModel], job: dict[str, Any], **more: Any) -> PreTrainedModel:
    """Random weights of the job's shape on its device: bf16 under adapters, fp32 where they are trained themselves."""
    config = LlamaConfig(**job["config"], pad_token_id=0, bos_token_id=1, eos_token_id=1, **more)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if job["rank"] else torch.float32)
    try:
        with torch.device(job["device"]):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


class Clock:
    """When each step ended, in seconds, and whether there is time for another.

    The device is waited for where the steps that count begin and end. Between those, both sides read a number off it in
    every step, so that their ends are known without another wait.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._device = torch.device(job["device"])
        self._last, self._deadline = WARM + job["steps"], job["deadline"]
        self._ends: list[float] = []
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def step_ended(self) -> bool:
        """Note the end of a step; gives whether it was the last that there is time for."""
        late = len(self._ends) > WARM and time.time() > self._deadline
        over = late or len(self._ends) + 1 == self._last
        if over or len(self._ends) + 1 == WARM:
            rates.wait(self._device)
        self._ends.append(time.perf_counter())
        return over

    def found(self, work: list[float]) -> dict[str, Any]:
        """The rate in units of work a second, seconds of the steps that count, and the peak of memory in bytes."""
        starts, ends = self._ends[WARM - 1 : -1], self._ends[WARM:]
        if not ends:
            raise RuntimeError(f"only {len(self._ends)} steps were made, and the first {WARM} do not count")
        seconds = [end - start for start, end in zip(starts, ends, strict=True)]
        rate = median(done / taken for done, taken in zip(work[WARM:], seconds, strict=False))
        peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0
        return {"rate": rate, "seconds": seconds, "peak": peak}


def machine(job: dict[str, Any]) -> dict[str, Any]:
    """The device's name and its rates of bf16 products, in FLOP/s: `matrix_rate` of the largest square ones, `own_rate`
    of those that the model is made of.
    """
    device, config = torch.device(job["device"]), LlamaConfig(**job["config"])
    shapes = Counter(list(flops.linears(config).values()) * config.num_hidden_layers)
    if job["stage"] == "sft":
        shapes[config.hidden_size, config.vocab_size] += 1
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "matrix_rate": rates.square(job["square"], torch.bfloat16, device),
        "own_rate": rates.of_shapes(shapes, job["row_tokens"], torch.bfloat16, device),
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found
