"""SFT and reward training, ours and TRL's in turn: throughput, peak memory, and our share of the matrix-product rate.

    python benchmarks/train.py [--quick] [--pairs 5] [--case sft_lora] [--profile]

TRL 1.16 runs in an environment of its own (trl_environment.py), each side in a process of its own with the same model,
token ids, precision (bf16 where the processor multiplies it, else fp32), optimizer, learning rate and threads. Lengths
and answer counts are those of a real site (workload.py). The first step of each run is not counted.

    sft_lora, reward_lora   SmolLM2-135M-Instruct, LoRA of rank 16 on all projections
    sft_full, reward_full   a Llama of 15.7M parameters (4 layers of 256, SmolLM2's vocabulary of 49,152), all weights

TRL has its best settings here: SFT packs by "wrapped" (full rows of 512, 4 a step, across documents) or "bfd" (whole
documents, without padding), whichever is faster on this machine in a trial (`--quick` takes "wrapped", which was faster
wherever it was tried); no activation checkpointing, and 4 pairs a
step for reward. Ours packs whole documents, 2,048 tokens a step, and 8 questions a step with all their answers. SFT
learns every token on both sides; a pair is a pair on both sides.

The share of the peak is the work that the mathematics needs (flops.py has the formula), over the time and the rate of
matrix products of the model's own shapes in the same process.

Prints a table and, as its last line, one JSON object: ours over TRL's, medians over pairs of runs (throughput: more is
better; memory: less is better); `sft_lora_share_of_peak`; and `precision`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import flops
import torch
import workload
from transformers import LlamaConfig
from trl_environment import TRAINING, python_with_trl

from stackllama.assembly import BF16_FEATURES
from stackllama.environment import processor_features
from stackllama.model.folder import save_model
from stackllama.model.load import load_base
from stackllama.model.random_init import random_llama

HERE = Path(__file__).resolve().parent
CASES = ("sft_lora", "sft_full", "reward_lora", "reward_full")
LORA = {
    "rank": 16,
    "alpha": 32.0,
    "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
STEP, LENGTH = 2048, 512
"""Tokens of an SFT step, and of TRL's rows."""
VOCABULARY = 49152
Measure = Callable[[str, Path, argparse.Namespace, Path], dict[str, float]]
"""Of a case, its model, the options and a folder for what the sides are told: the ratios by name."""


def models(folder: Path) -> dict[str, Path]:
    """Both models, as folders that both sides load."""
    base = load_base("smollm2-135m-instruct", dtype=torch.bfloat16)
    save_model(folder / "lora", base.model, base.tokenizer)
    save_model(folder / "full", random_llama("3m", base.tokenizer, seed=0, dtype=torch.float32), base.tokenizer)
    return {"lora": folder / "lora", "full": folder / "full"}


def job(case: str, model: Path, *, steps: int, threads: int, bf16: bool) -> dict[str, Any]:
    """What both sides are told."""
    stage, method = case.split("_")
    told: dict[str, Any] = {
        "stage": stage,
        "model": str(model),
        "lora": LORA if method == "lora" else None,
        "adapter": None,
        "bf16": bf16,
        "steps": steps,
        "threads": threads,
        "learning_rate": 1e-4,
        "batch": 4,
        "length": LENGTH,
        "packing": "wrapped",
        "in_order": False,
        "centring": 0.0,
        "tokens_per_step": STEP,
        "row_tokens": STEP,
        "questions_per_step": 8,
    }
    if stage == "sft":
        documents = workload.documents(VOCABULARY, LENGTH)
        return {**told, "documents": documents * (1 + STEP * (steps + 2) // sum(map(len, documents)))}
    trees = workload.paired(VOCABULARY)
    pairs = [
        (one.tree.root + one.tree.branches[b], one.tree.root + one.tree.branches[w])
        for one in trees
        for b, w in one.pairs
    ]
    return {
        **told,
        "questions": [{"root": one.tree.root, "branches": one.tree.branches, "pairs": one.pairs} for one in trees],
        "pairs": {"chosen_ids": [better for better, _ in pairs], "rejected_ids": [worse for _, worse in pairs]},
    }


def run(python: Path, script: str, told: dict[str, Any], folder: Path, *more: str) -> dict[str, Any]:
    """What one side takes for a job, in a process of its own."""
    path = folder / f"{script}.json"
    path.write_text(json.dumps(told))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), str(HERE / f"{script}.py"), str(path), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    lines = done.stdout.splitlines()
    if "--profile" in more:
        print("\n".join(lines[:-1]))
    found: dict[str, Any] = json.loads(lines[-1])
    timed = slice(1, len(found["seconds"]))
    found["rate"] = sum(found["work"][timed]) / sum(found["seconds"][timed])
    return found


def flops_per_token(model: Path, documents: Sequence[Sequence[int]]) -> float:
    """What SFT with LoRA needs for a token of these documents."""
    seen = flops.visible([(len(one), ()) for one in documents])
    return flops.per_token(LlamaConfig.from_pretrained(model), rank=LORA["rank"], seen=seen)  # type: ignore[arg-type]


def measure(case: str, model: Path, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Print the pairs of runs of a case; gives its ratios."""
    bf16 = bool(BF16_FEATURES & set(processor_features()))
    trl = python_with_trl(TRAINING)
    # A step of TRL takes many seconds: two are enough to time, as runs are repeated.
    told = job(case, model, steps=2 if options.quick else 3, threads=options.threads, bf16=bf16)
    if case.startswith("sft") and not options.quick:
        trials = {one: run(trl, "trl_train", {**told, "packing": one}, folder)["rate"] for one in ("wrapped", "bfd")}
        told["packing"] = max(trials, key=trials.__getitem__)
        print(f"{case}: TRL packs {told['packing']} ({', '.join(f'{k} {v:.1f}' for k, v in trials.items())} tokens/s)")
    unit = "tokens" if case.startswith("sft") else "pairs"
    print(
        f"{case:12} {'TRL ' + unit + '/s':>14} {'ours':>9} {'ratio':>7} {'TRL MB':>8} {'ours MB':>8} {'memory':>7} "
        f"{'share of peak':>14}"
    )
    ratios, memories, shares = [], [], []
    for _ in range(options.pairs):
        theirs = run(trl, "trl_train", told, folder)
        steps = {**told, "steps": 3 if options.quick else 9}
        ours = run(Path(sys.executable), "ours_train", steps, folder, *(["--profile"] if options.profile else []))
        ratios.append(ours["rate"] / theirs["rate"])
        memories.append(ours["peak"] / theirs["peak"])
        share = float("nan")
        if case == "sft_lora":
            share = flops_per_token(model, told["documents"]) * ours["rate"] / ours["matrix_rate"]
            shares.append(share)
        print(
            f"{'':12} {theirs['rate']:14.2f} {ours['rate']:9.2f} {ratios[-1]:7.2f} {theirs['peak'] / 1e6:8.0f} "
            f"{ours['peak'] / 1e6:8.0f} {memories[-1]:7.2f} {share:14.2f}",
            flush=True,
        )
    print(
        f"{case}: {median(ratios):.2f} times, from {min(ratios):.2f} to {max(ratios):.2f}; memory "
        f"{median(memories):.2f}"
    )
    found = {case: median(ratios)}
    if case.endswith("lora"):
        found[f"{case}_memory"] = median(memories)
    if shares:
        found[f"{case}_share_of_peak"] = median(shares)
    return found


def parser_for(description: str | None, cases: Sequence[str]) -> argparse.ArgumentParser:
    """What every benchmark of pairs may be asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of short runs of each case")
    parser.add_argument("--pairs", type=int, help="pairs of runs of each case (5)")
    parser.add_argument("--case", action="append", choices=cases, help="only this case; may be repeated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def run_cases(options: argparse.Namespace, cases: Sequence[str], measure: Measure) -> None:
    """Measure the cases that are asked for, and print their ratios as the last line."""
    options.pairs = options.pairs or (1 if options.quick else 5)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        there = models(Path(name))
        for case in options.case or cases:
            found |= measure(case, there[case.split("_")[1]], options, Path(name))
    precision = "bf16" if BF16_FEATURES & set(processor_features()) else "fp32"
    print(json.dumps({**{name: round(value, 3) for name, value in found.items()}, "precision": precision}))


def main() -> None:
    parser = parser_for(__doc__, CASES)
    parser.add_argument("--profile", action="store_true", help="print our operators by processor time")
    run_cases(parser.parse_args(), CASES, measure)


if __name__ == "__main__":
    main()
