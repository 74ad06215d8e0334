"""Our side of ppo.py: the source, the loop and the roles of every PPO run, on a job's prompts.

    python ours_ppo.py JOB.json

The last line is one JSON object, as trl_ppo.py prints it: seconds of each round, the episodes of each, the response
tokens, and the peak of memory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from ours_train import loop_for

from stackllama.model import memory
from stackllama.model.folder import load_model
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives import kl, ppo, reward
from stackllama.objectives.scaling import ScoreShaping
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY, ExperienceSource, PPOSettings
from stackllama.tokens.batches import StepResult
from stackllama.tokens.forest import Tree

NEVER = 5
"""A token that marks files of a repository: none of these runs draws it, so none ends early."""


def trunk_for(job: dict[str, Any]) -> Trunk:
    """The job's model with a policy and a reward role."""
    precision = torch.bfloat16 if job["bf16"] else torch.float32
    base = load_model(Path(job["model"]), precision if job["lora"] else torch.float32, attention="forest")
    trunk = Trunk(base.model, precision=precision)
    for number, role in enumerate((POLICY, "reward")):
        if job["lora"]:
            lora = job["lora"]
            trunk.add_adapter(role, LoRA(lora["rank"], lora["alpha"], 0.0, tuple(lora["targets"])), seed=number)
        else:
            trunk.add_copy(role)
    trunk.add_head(POLICY, ppo.HEAD, spread=0.0, seed=0)
    trunk.add_head("reward", reward.HEAD, spread=0.02, seed=0)
    return trunk


def source(job: dict[str, Any], trunk: Trunk) -> ExperienceSource:
    """Rounds of the job's prompts."""
    each = job["episodes"] // job["samples"]
    settings = PPOSettings(
        rounds=job["rounds"],
        prompts=each,
        samples=job["samples"],
        epochs=job["epochs"],
        minibatches=1,
        gamma=1.0,
        gae_lambda=0.95,
        whiten=True,
        missing_eos_penalty=0.0,
        kl_in_reward=True,
        kl_stop=None,
        row_tokens=2048,
    )
    return ExperienceSource(
        trunk,
        [Tree(tuple(ids), (), key) for key, ids in enumerate(job["prompts"])],
        settings=settings,
        sampling=Sampling(seed=0, max_new_tokens=job["new_tokens"], eos_id=NEVER),
        controller=kl.FixedController(job["kl"]),
        estimator=kl.k1,
        shaping=ScoreShaping(scaling=False, clip=None),
        estimate=None,
        reward_role="reward",
    )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    trunk = trunk_for(job)
    ends = [time.perf_counter()]

    def after(result: StepResult) -> None:
        if result.step % job["epochs"] == 0:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as name:
        rounds = source(job, trunk)
        objective = ppo.PPOObjective(clip=0.2, value=ppo.ValueLoss(0.2, 0.1))
        loop_for(job, trunk, objective, rounds, Path(name), after).run()
        lengths = {
            json.loads(line)["length"] for line in (Path(name) / "metrics.jsonl").read_text("utf-8").splitlines()
        }
    assert lengths == {float(job["new_tokens"])}, f"responses of {lengths} tokens"
    seconds = [end - start for start, end in pairwise(ends)]
    print(json.dumps({"seconds": seconds, "work": [job["episodes"]] * job["rounds"], "peak": memory.peak()}))


if __name__ == "__main__":
    main()
