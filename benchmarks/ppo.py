"""PPO, ours and TRL's in turn: episodes a second and peak memory.

    python benchmarks/ppo.py [--quick] [--pairs 5] [--case ppo_lora]

TRL 1.12, the last release with PPO, runs in an environment of its own (trl_environment.py), each side in a process of
its own with the same policy, prompts, new tokens, epochs, learning rate, precision (bf16 where the processor multiplies
it, else fp32) and threads. The first round of each run is not counted.

    ppo_full          a Llama of 15.7M parameters, all weights; 16 episodes a round, of 16 prompts
    ppo_lora          SmolLM2-135M-Instruct, LoRA of rank 16 on all projections; 8 episodes a round, of 8 prompts
    ppo_full_grouped  the first with four samples of each of 4 prompts
    ppo_lora_grouped  the second with four samples of each of 2 prompts

A round samples responses of exactly 64 tokens at temperature 1 (no token ends one early, on either side), scores them,
and makes 4 epochs of one minibatch. TRL has no samples of one prompt: it gets a prompt as often as ours samples it.

Models of the peer are as its own example has them: policy, reference, reward and value model, with LoRA a reference
that is the policy without its adapter, and here LoRA on the value model too, which its example trains in full. No
activation checkpointing, one forward for all episodes. Ours has all roles on one trunk; a full policy and a full reward
model are copies.

Prints a table and, as its last line, one JSON object: ours over TRL's, medians over pairs of runs (throughput: more is
better; `ppo_lora_memory`: less is better); and `precision`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import workload
from trl_environment import PPO, python_with_trl

from stackllama.assembly import BF16_FEATURES
from stackllama.environment import processor_features
from train import LORA, VOCABULARY, parser_for, run, run_cases

CASES = ("ppo_full", "ppo_lora", "ppo_full_grouped", "ppo_lora_grouped")
EPISODES = {"full": 16, "lora": 8}
SAMPLES, NEW_TOKENS, EPOCHS = 4, 64, 4
LONGEST = 128
"""Tokens of a prompt; longer questions of the workload are cut to it."""


def prompts(count: int) -> list[list[int]]:
    """Token ids of prompts as long as real questions are."""
    random = np.random.default_rng(3)
    lengths = [min(shape.question, LONGEST) for shape in workload.shapes()][:count]
    return [random.integers(100, VOCABULARY, length).tolist() for length in lengths]


def job(case: str, model: Path, *, rounds: int, threads: int, bf16: bool) -> dict[str, Any]:
    """What both sides are told."""
    method, grouped = case.split("_")[1], case.endswith("grouped")
    episodes, samples = EPISODES[method], SAMPLES if grouped else 1
    return {
        "model": str(model),
        "lora": LORA if method == "lora" else None,
        "bf16": bf16,
        "threads": threads,
        "rounds": rounds,
        "episodes": episodes,
        "samples": samples,
        "prompts": prompts(rounds * episodes // samples),
        "new_tokens": NEW_TOKENS,
        "epochs": EPOCHS,
        "learning_rate": 1e-5,
        "kl": 0.05,
    }


def measure(case: str, model: Path, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Print the pairs of runs of a case; gives its ratios."""
    bf16 = bool(BF16_FEATURES & set(processor_features()))
    trl = python_with_trl(PPO)
    told = job(case, model, rounds=2 if options.quick else 3, threads=options.threads, bf16=bf16)
    print(
        f"{case:18} {'TRL episodes/s':>14} {'ours':>8} {'ratio':>7} {'TRL MB':>8} {'ours MB':>8} {'memory':>7}",
        flush=True,
    )
    ratios, memories = [], []
    for _ in range(options.pairs):
        theirs, ours = run(trl, "trl_ppo", told, folder), run(Path(sys.executable), "ours_ppo", told, folder)
        ratios.append(ours["rate"] / theirs["rate"])
        memories.append(ours["peak"] / theirs["peak"])
        print(
            f"{'':18} {theirs['rate']:14.3f} {ours['rate']:8.3f} {ratios[-1]:7.2f} {theirs['peak'] / 1e6:8.0f} "
            f"{ours['peak'] / 1e6:8.0f} {memories[-1]:7.2f}",
            flush=True,
        )
    print(
        f"{case}: {median(ratios):.2f} times, from {min(ratios):.2f} to {max(ratios):.2f}; memory "
        f"{median(memories):.2f}"
    )
    return {case: median(ratios), f"{case}_memory": median(memories)}


if __name__ == "__main__":
    run_cases(parser_for(__doc__, CASES).parse_args(), CASES, measure)
