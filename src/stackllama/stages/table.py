"""Command -> function of its stages. Every function takes a resolved recipe and an open run, does its stages from
wherever they stand, and returns when they are complete; a complete stage is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stackllama.recipe import Recipe
from stackllama.run import Run
from stackllama.stages.data import run_data
from stackllama.stages.evaluate import run_evaluate
from stackllama.stages.policy import run_dpo, run_ppo
from stackllama.stages.reward import run_reward
from stackllama.stages.sft import run_sft

STAGES: Mapping[str, Callable[[Recipe, Run], None]] = {
    "data": run_data,
    "sft": run_sft,
    "reward": run_reward,
    "ppo": run_ppo,
    "dpo": run_dpo,
    "evaluate": run_evaluate,
}
