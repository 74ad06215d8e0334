"""Our side of train.py and curves.py: the loop, the sources and the roles of every run, on a job's token ids.

    python ours_train.py JOB.json [--profile]

The last line is one JSON object, as trl_train.py prints it, and the machine's rate of matrix products on the model's
own shapes beside it. `--profile` prints what the processor did in the timed steps, by operator.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import rates
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from stackllama.model import memory
from stackllama.model.folder import load_model
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives import reward
from stackllama.objectives.base import Objective
from stackllama.objectives.sft import SftObjective
from stackllama.tokens.batches import Source, StepResult
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import PairedTree, reward_source, sft_source
from stackllama.train.guard import Guard
from stackllama.train.loop import Loop, Settings
from stackllama.train.metrics import JsonlLog
from stackllama.train.optim import make_optimizer


class Watched:
    """A source that notes what each step trains on; it yields the items in their order, so many a step."""

    def __init__(self, source: Source[Any], steps: int) -> None:
        self.total_work, self.unit = source.total_work, source.unit
        self._source, self._left = source, steps
        self.work: list[float] = []

    def prepare(self) -> None:
        self._source.prepare()

    def next(self) -> Any:
        batch = self._source.next() if self._left else None
        self._left -= 1
        if batch is not None:
            pairs = sum(len(row.better_P) for row in batch.rows if hasattr(row, "better_P"))
            self.work.append(pairs or batch.work)
        return batch

    def observe(self, result: StepResult) -> None:
        self._source.observe(result)

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source.load_state_dict(state)


class InOrder:
    """So many items a step, in their order: each step is the whole of a source of its own, by which a step is packed
    and counted as in every run.
    """

    def __init__(self, make: Callable[[Sequence[Any]], Source[Any]], items: Sequence[Any], per_step: int) -> None:
        whole = make(items)
        self.total_work, self.unit = whole.total_work, whole.unit
        self._steps = (make(items[at : at + per_step]) for at in range(0, len(items), per_step))

    def prepare(self) -> None:
        pass

    def next(self) -> Any:
        step = next(self._steps, None)
        return None if step is None else step.next()

    def observe(self, result: StepResult) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}  # a benchmark is never gone on with

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def source(job: dict[str, Any]) -> Source[Any]:
    """The job's items, ``batch`` a step in their order where that is asked for, and else in an order of our own."""
    common: dict[str, Any] = {"row_tokens": job["row_tokens"], "max_steps": job["steps"] + 1, "seed": 0}
    common["epochs"] = 1 if job["in_order"] else 100
    if job["stage"] == "sft":
        trees = [Tree(tuple(ids), (), key) for key, ids in enumerate(job["documents"])]
        if job["in_order"]:
            whole = partial(sft_source, everything=True, tokens_per_step=10**9, **common)
            return InOrder(whole, trees, job["batch"])
        return sft_source(trees, everything=True, tokens_per_step=job["tokens_per_step"], **common)
    paired = [
        PairedTree(
            Tree(tuple(one["root"]), tuple(map(tuple, one["branches"])), key),
            tuple((better, worse) for better, worse in one["pairs"]),
            (0.0,) * len(one["pairs"]),
            tuple(range(len(one["branches"]))),
            1 / len(one["pairs"]),
            1.0,
        )
        for key, one in enumerate(job["questions"])
    ]
    if job["in_order"]:
        return InOrder(partial(reward_source, questions_per_step=job["batch"], **common), paired, job["batch"])
    return reward_source(paired, questions_per_step=job["questions_per_step"], **common)


def own_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """(features in, features out) of the model's linear layers -> how many have them."""
    return Counter((one.in_features, one.out_features) for one in model.modules() if isinstance(one, nn.Linear))


def trunk_for(job: dict[str, Any], role: str) -> Trunk:
    """The job's model with the role that is trained."""
    precision = torch.bfloat16 if job["bf16"] else torch.float32
    base = load_model(Path(job["model"]), precision if job["lora"] else torch.float32, attention="forest")
    trunk = Trunk(base.model, precision=precision)
    if job["lora"]:
        lora = job["lora"]
        trunk.add_adapter(role, LoRA(lora["rank"], lora["alpha"], 0.0, tuple(lora["targets"])), seed=0)
    elif job["stage"] == "sft":
        trunk.train_in_place(role)
    else:
        trunk.add_copy(role)
    if job["stage"] == "reward":
        trunk.add_head(role, reward.HEAD, spread=0.02, seed=0)
    return trunk


def loop_for(
    job: dict[str, Any],
    trunk: Trunk,
    objective: Objective[Any],
    source: Source[Any],
    folder: Path,
    after: Callable[[StepResult], None],
) -> Loop[Any]:
    """The loop of every run, at a constant rate, without checkpoints on the way."""
    return Loop(
        trunk=trunk,
        objective=objective,
        source=source,
        optimizer=make_optimizer(trunk.trainable(objective.role), learning_rate=job["learning_rate"]),
        learning_rate=lambda _: job["learning_rate"],
        guard=Guard(None),
        settings=Settings(1.0, 10**9, 1),
        folder=folder / "checkpoints",
        log=JsonlLog(folder / "metrics.jsonl"),
        title=objective.role,
        after_step=[after],
    )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    role = "sft" if job["stage"] == "sft" else "reward"
    trunk = trunk_for(job, role)
    objective: Objective[Any] = (
        SftObjective() if job["stage"] == "sft" else reward.RewardObjective(role, centring=job["centring"])
    )
    watched = Watched(source(job), job["steps"])
    ends = [time.perf_counter()]
    losses: list[float] = []

    def after(result: StepResult) -> None:
        ends.append(time.perf_counter())
        losses.append(result.loss)

    with tempfile.TemporaryDirectory() as name:
        loop = loop_for(job, trunk, objective, watched, Path(name), after)
        if "--profile" in sys.argv:
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                loop.run()
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50))
        else:
            loop.run()
    peak = memory.peak()
    seconds = [end - start for start, end in pairwise(ends)]
    rate = rates.of_shapes(own_shapes(trunk.model), job["tokens_per_step"], trunk.precision, trunk.device)
    print(json.dumps({"seconds": seconds, "work": watched.work, "losses": losses, "peak": peak, "matrix_rate": rate}))


if __name__ == "__main__":
    main()
