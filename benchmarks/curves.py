"""Loss curves of SFT and reward training, ours and TRL's, on identical batches from identical weights.

    python benchmarks/curves.py [--steps 60] [--case sft] [--learning-rate 3e-4] [--repacked] [--out FOLDER]

The embedded base model (3.4M parameters, 4 layers of 256), the embedded community, LoRA of rank 16 on all projections,
no dropout, AdamW at a constant rate, gradients clipped to 1, fp32 (bf16 has roundings of its own, which differ with the
layout of a batch). TRL 1.16 runs in an environment of its own (trl_environment.py). Both sides start from the same
adapter, and for reward from the same score head, in a folder that peft reads; a step has the same 8 documents, or the
same 8 questions with one pair each. TRL pads them; ours packs them, a question once for both of its answers.

    sft              every token of a question with its best answer
    reward           the pairwise loss
    reward_centred   the same, with 0.01 of the centring term

A curve is smoothed by a running mean over 10 steps. Prints each curve at ten places and, as its last line, one JSON
object: for each case `last_quarter`, the largest relative difference of the smoothed curves in their last quarter, and
`final`, that at the last step; and `raw`, the largest of a single step of the whole run, unsmoothed. `--repacked`
compares ours with ours in shorter rows, in place of TRL: what rounding alone does. `--out` keeps the curves, as
CASE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from ours_train import trunk_for
from safetensors.torch import save_file
from trl_environment import TRAINING, python_with_trl

from stackllama.data.building import build
from stackllama.data.pairs.rules import PairRules
from stackllama.data.posts import Question
from stackllama.data.store import store
from stackllama.data.synthetic import community as synthetic
from stackllama.model.folder import save_model
from stackllama.model.load import load_base
from stackllama.objectives.reward import HEAD
from stackllama.tokens.sources import encode_answers, encode_pairs
from stackllama.tokens.tokenizer import Tokenizer
from train import LORA, run

CASES = ("sft", "reward", "reward_centred")
BATCH = 8
SMOOTHED = 10
"""Steps of the running mean."""
CENTRING = 0.01
FRACTIONS = {"sft": 0.4, "reward": 0.6, "judge": 0.0, "ppo": 0.0, "eval": 0.0}
MOST = 512
"""Tokens of a document, or of a question with an answer."""


def questions(folder: Path, count: int) -> dict[str, list[Question]]:
    """The questions of an embedded community, by split."""
    synthetic.write_dump(folder / "dump", questions=count, seed=0, fractions=FRACTIONS)
    settings = build.Settings(FRACTIONS, PairRules(), build.Clustering(near_copies=False))
    dump = build.sources([folder / "dump"], synthetic.SITE)
    build.build(dump, folder, settings, build.Machine(), ledger=folder / "ledger.parquet", fingerprint=0)
    return {split: list(store.read_questions(folder, split)) for split in ("sft", "reward")}


def texts(tokenizer: Tokenizer, found: list[Question]) -> dict[str, Any]:
    """The documents of SFT: questions with their best answers."""
    encoded = encode_answers(tokenizer, found, titles=True, answers="best", max_tokens=MOST)
    return {"documents": [tree.root + tree.branches[0] for tree in encoded.items]}


def pairs(tokenizer: Tokenizer, found: list[Question]) -> dict[str, Any]:
    """The first pair of each question, as a tree and as two sequences."""
    encoded = encode_pairs(
        tokenizer,
        found,
        titles=True,
        answers_per_question=8,
        max_question_tokens=MOST // 2,
        max_answer_tokens=MOST // 2,
        row_tokens=4 * MOST,
        by_pairs=False,
        seed=0,
    )
    trees: list[dict[str, Any]] = []
    for one in encoded.items:
        better, worse = (one.tree.branches[at] for at in one.pairs[0])
        trees.append({"root": one.tree.root, "branches": [better, worse], "pairs": [(0, 1)]})
    sides = ([one["root"] + one["branches"][at] for one in trees] for at in (0, 1))
    return {"questions": trees, "pairs": dict(zip(("chosen_ids", "rejected_ids"), sides, strict=True))}


def job(case: str, model: Path, *, steps: int, threads: int, learning_rate: float) -> dict[str, Any]:
    """What both sides are told, but for the token ids and the adapter."""
    return {
        "stage": case.split("_")[0],
        "model": str(model),
        "lora": LORA,
        "adapter": None,
        "bf16": False,
        "steps": steps,
        "threads": threads,
        "learning_rate": learning_rate,
        "batch": BATCH,
        "length": MOST,
        "packing": False,
        "in_order": True,
        "centring": CENTRING if case == "reward_centred" else 0.0,
        "tokens_per_step": 2048,  # sizes the products that ours_train.py times
        "row_tokens": 2048,
    }


def write_adapter(told: dict[str, Any], folder: Path) -> None:
    """What our side starts from, by the same call, as peft keeps it."""
    stage, lora = told["stage"], told["lora"]
    role = "sft" if stage == "sft" else "reward"
    tensors = {}
    for name, tensor in trunk_for(told, role).state(role).items():
        if name.startswith("head."):
            part = name.removeprefix(f"head.{HEAD}.")
            tensors[f"base_model.model.score.{part}"] = tensor.reshape(1, -1) if part == "weight" else tensor.reshape(1)
        else:
            tensors[f"base_model.model.{name}"] = tensor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if stage == "sft" else "SEQ_CLS",
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": 0.0,
        "target_modules": lora["targets"],
        "modules_to_save": None if stage == "sft" else ["score"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def differences(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The figures of the last line, by their names."""
    window = np.ones(SMOOTHED) / SMOOTHED
    first, second = (np.convolve(curve, window, "valid") for curve in (ours, theirs))
    apart = np.abs(first - second) / np.abs(second)
    raw = np.abs(np.subtract(ours, theirs)) / np.abs(theirs)
    return {"last_quarter": float(apart[-len(ours) // 4 :].max()), "final": float(apart[-1]), "raw": float(raw.max())}


def compare(told: dict[str, Any], case: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train on both sides and print the curves; gives how far they are apart."""
    other = "repacked" if options.repacked else "TRL"
    with redirect_stdout(sys.stderr):  # what both sides tell of each step
        if options.repacked:
            second = run(Path(sys.executable), "ours_train", {**told, "row_tokens": longest(told)}, folder)
        else:
            write_adapter(told, folder / case)
            second = run(python_with_trl(TRAINING), "trl_train", {**told, "adapter": str(folder / case)}, folder)
        first = run(Path(sys.executable), "ours_train", told, folder)
    curves = {"ours": first["losses"], other: second["losses"]}
    assert {len(curve) for curve in curves.values()} == {told["steps"]}, f"{case}: a side left steps out"
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{case}.json").write_text(json.dumps(curves) + "\n")
    print(f"{case:16} {'step':>5} {'ours':>12} {other:>12} {'difference':>11}")
    for at in np.linspace(0, told["steps"] - 1, 10).round().astype(int):
        ours, theirs = curves["ours"][at], curves[other][at]
        print(f"{'':16} {at + 1:5} {ours:12.7f} {theirs:12.7f} {abs(ours - theirs) / abs(theirs):11.1e}", flush=True)
    return differences(curves["ours"], curves[other])


def longest(told: dict[str, Any]) -> int:
    """Tokens of the longest document or tree."""
    if told["stage"] == "sft":
        return max(map(len, told["documents"]))
    return max(len(one["root"]) + sum(map(len, one["branches"])) for one in told["questions"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--case", action="append", choices=CASES, help="only this case; may be repeated")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--repacked", action="store_true", help="compare with ours in other rows, not with TRL")
    parser.add_argument("--out", type=Path, help="folder for the curves")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = load_base("embedded", dtype=torch.float32)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", base.model, base.tokenizer)
        read = questions(folder, 24 * options.steps)
        inputs = {"sft": texts(base.tokenizer, read["sft"]), "reward": pairs(base.tokenizer, read["reward"])}
        for case in options.case or CASES:
            told = job(
                case,
                folder / "model",
                steps=options.steps,
                threads=options.threads,
                learning_rate=options.learning_rate,
            )
            told |= inputs[told["stage"]]
            items = len(told["documents"] if told["stage"] == "sft" else told["questions"])
            assert items >= told["steps"] * told["batch"], f"{case}: {items} are too few"
            found[case] = compare(told, case, folder, options)
    rounded = {case: {key: float(f"{value:.2g}") for key, value in one.items()} for case, one in found.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
