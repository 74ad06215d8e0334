"""Our side of gpu.py: the loop, the source and the role of a run, on a job's token ids.

python ours_gpu.py JOB.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gpu_side
import ours_train
import torch
from torch.profiler import profile
from transformers import LlamaForCausalLM

from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives import reward
from stackllama.objectives.base import Objective
from stackllama.objectives.sft import SftObjective
from stackllama.tokens.batches import StepResult


class EnoughError(Exception):
    """The last step was made; what a loop does after it (a checkpoint of all weights) is not measured."""


def trunk_for(job: dict[str, Any], role: str) -> Trunk:
    """Random weights with the role that is trained."""
    base = gpu_side.model_of(LlamaForCausalLM, job, attn_implementation="forest")
    trunk = Trunk(base, precision=torch.bfloat16)
    if job["checkpointing"]:
        trunk.recompute_activations()
    if job["rank"]:
        trunk.add_adapter(role, LoRA(job["rank"], job["alpha"], 0.0, tuple(job["targets"])), seed=0)
    else:
        trunk.train_in_place(role)
    if job["stage"] == "reward":
        trunk.add_head(role, reward.HEAD, spread=0.01, seed=0)
    return trunk


def trained(job: dict[str, Any]) -> dict[str, Any]:
    """Train as long as the job says; gives what the clock found."""
    role = job["stage"]
    trunk = trunk_for(job, role)
    objective: Objective[Any] = SftObjective() if role == "sft" else reward.RewardObjective(role)
    steps = job["steps"] + gpu_side.WARM
    source = ours_train.Watched(ours_train.source({**job, "steps": steps}), steps)
    clock = gpu_side.Clock(job)
    profiler = profile()

    def after(result: StepResult) -> None:
        if job["profile"] and result.step == gpu_side.WARM:
            profiler.start()
        if clock.step_ended():
            raise EnoughError

    with tempfile.TemporaryDirectory() as name:
        loop = ours_train.loop_for(job, trunk, objective, source, Path(name), after)
        try:
            loop.run()
        except EnoughError:
            if job["profile"]:
                profiler.stop()
                table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=40)
                gpu_side.tell(profile=table)
            return clock.found(source.work)
    raise RuntimeError("the source ended before the last step")


def main() -> None:
    job = gpu_side.read_job()
    gpu_side.tell(**gpu_side.machine(job))
    gpu_side.tell(trial="", **trained(job))


if __name__ == "__main__":
    main()
