"""Trains a little in this process, and prints its peak beside the prediction that was made before anything was loaded.

    python tests/model/memory_worker.py BASE STAGE METHOD ROW_TOKENS LONGEST [--bf16] [--nf4] [--steps 2] [--checkpoint]

LONGEST: tokens of a document, or of a question with one of its two answers, half each. The last line is JSON: predicted
and measured bytes, and the predicted parts. The caller sets what `stackllama.cli: PROCESS_SETTINGS` sets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from stackllama.data.synthetic import community
from stackllama.model import memory
from stackllama.model.load import base_config, load_base
from stackllama.model.nf4 import quantize
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives.base import Objective
from stackllama.objectives.reward import HEAD, RewardObjective
from stackllama.objectives.sft import SftObjective
from stackllama.planning import measured_program
from stackllama.tokens.batches import Source
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import PairedTree, reward_source, sft_source
from stackllama.train.guard import Guard
from stackllama.train.loop import Loop, Settings
from stackllama.train.metrics import JsonlLog
from stackllama.train.optim import make_optimizer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, VOCABULARY = 16, 1024


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("stage", choices=("sft", "reward"))
    parser.add_argument("method", choices=("lora", "full"))
    parser.add_argument("row_tokens", type=int)
    parser.add_argument("longest", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--checkpoint", action="store_true")
    return parser.parse_args()


def prediction(how: argparse.Namespace, precision: torch.dtype) -> memory.Moment:
    full, sft = how.method == "full", how.stage == "sft"
    shape = memory.shape_of(base_config(how.base, vocabulary=VOCABULARY))
    weights = 4 if full else precision.itemsize
    machine = memory.Machine(measured_program(), weights, precision.itemsize, quantized=how.nf4)
    half = how.longest // 2
    row = memory.full_row(how.row_tokens, *([how.longest] if sft else [half, (half, half)]))
    method = memory.Method() if full else memory.Method(RANK, TARGETS)
    scored = row[-1].stop if sft else 0
    return max(
        memory.loading(shape, machine, stored=4),
        *([memory.quantizing(shape, machine)] if how.nf4 else []),
        memory.training(shape, machine, method, row, in_place=sft, scored=scored),
        key=lambda moment: moment.peak,
    )


def ids(count: int, key: int) -> tuple[int, ...]:
    return tuple((key * 7 + at * 13) % 500 + 5 for at in range(count))


def source(how: argparse.Namespace) -> Source[Any]:
    common = {"row_tokens": how.row_tokens, "epochs": 1000, "max_steps": how.steps, "seed": 0}
    if how.stage == "sft":
        trees = [Tree(ids(how.longest, key), (), key) for key in range(32)]
        return sft_source(trees, everything=True, tokens_per_step=2 * how.row_tokens, **common)
    half = how.longest // 2
    paired = [
        PairedTree(
            Tree(ids(half, key), (ids(half, key + 1), ids(half, key + 2)), key), ((0, 1),), (0.0,), (0, 1), 1.0, 1.0
        )
        for key in range(32)
    ]
    return reward_source(paired, questions_per_step=2 * max(1, how.row_tokens // (3 * half)), **common)


def main() -> None:
    how = arguments()
    torch.set_num_threads(2)
    precision = torch.bfloat16 if how.bf16 else torch.float32
    predicted = prediction(how, precision)
    texts = [document.text for document in community.world_documents(300, 0)]
    dtype = torch.float32 if how.method == "full" else precision
    base = load_base(how.base, dtype=dtype, documents=texts, vocabulary=VOCABULARY, attention="forest")
    if how.nf4:
        quantize(base.model, base.model.device)
    trunk = Trunk(base.model, precision=precision)
    if how.method == "lora":
        trunk.add_adapter(how.stage, LoRA(RANK, 32.0, 0.0, TARGETS), seed=0)
    elif how.stage == "sft":
        trunk.train_in_place("sft")
    else:
        trunk.add_copy("reward")
    objective: Objective[Any] = SftObjective()
    if how.stage == "reward":
        trunk.add_head("reward", HEAD, spread=0.02, seed=0)
        objective = RewardObjective("reward")
    with tempfile.TemporaryDirectory() as folder:
        Loop(
            trunk=trunk,
            objective=objective,
            source=source(how),
            optimizer=make_optimizer(trunk.trainable(how.stage), learning_rate=1e-4),
            learning_rate=lambda _: 1e-4,
            guard=Guard(None),
            settings=Settings(1.0, 1 if how.checkpoint else how.steps, 1),
            folder=Path(folder) / "checkpoints",
            log=JsonlLog(Path(folder) / "metrics.jsonl"),
            title=how.stage,
        ).run()
    measured = memory.peak()
    print(json.dumps({"predicted": predicted.peak, "measured": measured, "parts": predicted.parts}))


if __name__ == "__main__":
    main()
