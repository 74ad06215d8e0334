"""SFT and reward training on one GPU, with random weights of the shapes of Llamas of 1B and 7B parameters.

    python benchmarks/gpu.py [--shape 1b] [--shape 7b] [--steps 8] [--device cuda]

For each shape: SFT with LoRA, SFT of all weights (1b alone: 7b needs 16 bytes a weight), and reward training with LoRA;
bf16, activation checkpointing where it is needed, rows of 8,192 tokens with documents of up to 2,048. Prints tokens (or
pairs) a second, the share of the machine's own rate of bf16 matrix products (the FLOPs that the mathematics needs, as
benchmarks/train.py counts them; what checkpointing computes again is not counted), and the peak of memory on the GPU.
The first two steps of each are not counted: they compile.

Without a GPU, `--device cpu --shape tiny` shows that the script runs, and nothing else. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import stackllama.model.attention  # noqa: F401  (registers "forest")
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives import reward
from stackllama.objectives.base import Objective
from stackllama.objectives.sft import SftObjective
from stackllama.tokens.batches import StepResult
from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import PairedTree, reward_source, sft_source
from stackllama.train.guard import Guard
from stackllama.train.loop import Loop, Settings
from stackllama.train.metrics import JsonlLog
from stackllama.train.optim import make_optimizer

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = 32000
WARM = 2
RANK = 16


def model(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Random weights, made where they will be."""
    vocabulary = 512 if shape == "tiny" else VOCABULARY
    config = LlamaConfig(**SHAPES[shape], vocab_size=vocabulary, attn_implementation="forest")
    with torch.device(device):
        made = LlamaForCausalLM(config)
    return made.to(dtype)


def documents(vocabulary: int, longest: int, total: int) -> list[Tree]:
    """Documents of so many tokens together, from a quarter of the longest up to it."""
    random = np.random.default_rng(0)
    trees: list[Tree] = []
    while total > 0:
        length = int(random.integers(longest // 4, longest + 1))
        trees.append(Tree(tuple(random.integers(10, vocabulary, length).tolist()), (), len(trees)))
        total -= length
    return trees


def questions(vocabulary: int, longest: int, count: int) -> list[PairedTree]:
    """Questions of a quarter of the longest length with four answers of an eighth, each better than the next."""
    random = np.random.default_rng(0)
    pairs = tuple((better, worse) for better in range(4) for worse in range(better + 1, 4))
    found = []
    for key in range(count):
        sizes = (longest // 4, *[longest // 8] * 4)
        root, *branches = (tuple(random.integers(10, vocabulary, size).tolist()) for size in sizes)
        tree = Tree(root, tuple(branches), key)
        found.append(PairedTree(tree, pairs, (0.0,) * len(pairs), tuple(range(4)), 1 / len(pairs), 1.0))
    return found


def flops_per_token(config: Any, *, full: bool, visible: float, scored: bool) -> float:
    """What a token of training needs: see benchmarks/train.py; all weights need a third product for their gradient."""
    d, f = config.hidden_size, config.intermediate_size
    linear = [(d, d)] * 4 + [(d, f), (d, f), (f, d)]
    weights = sum(i * o for i, o in linear)
    adapters = 0 if full else sum(6 * RANK * (i + o) for i, o in linear)
    layer = (6 if full else 4) * weights + adapters + 12 * d * visible
    head = (6 if full else 4) * config.vocab_size * d if scored else 0
    return float(config.num_hidden_layers * layer + head)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of square matrix products."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        left @ right
    wait()
    start = time.perf_counter()
    for _ in range(20):
        left @ right
    wait()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def trained(trunk: Trunk, objective: Objective[Any], source: Any, role: str) -> Iterator[float]:
    """The seconds of each step of the loop."""
    ends = [time.perf_counter()]

    def after(_: StepResult) -> None:
        ends.append(time.perf_counter())  # the loop has read the step's loss by then, so the device has done it

    with tempfile.TemporaryDirectory() as name:
        Loop(
            trunk=trunk,
            objective=objective,
            source=source,
            optimizer=make_optimizer(trunk.trainable(role), learning_rate=1e-5),
            learning_rate=lambda _: 1e-5,
            guard=Guard(None),
            settings=Settings(1.0, 10**9, 1),
            folder=Path(name) / "checkpoints",
            log=JsonlLog(Path(name) / "metrics.jsonl"),
            title=role,
            after_step=[after],
        ).run()
    yield from np.diff(ends).tolist()


def case(shape: str, stage: str, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Throughput, share of the peak and memory of one case."""
    device = torch.device(options.device)
    precision = torch.bfloat16
    tiny = shape == "tiny"
    longest, row_tokens = (64, 256) if tiny else (2048, 8192)
    full = method == "full"
    base = model(shape, device, torch.float32 if full else precision)
    if shape == "7b":
        base.activation_checkpointing_enable({"use_reentrant": False})
    trunk = Trunk(base, precision=precision)
    if full:
        trunk.train_in_place(stage)
    else:
        trunk.add_adapter(stage, LoRA(RANK, 32.0, 0.0, EVERY), seed=0)
    common = {"row_tokens": row_tokens, "epochs": 1, "max_steps": None, "seed": 0}
    vocabulary = base.config.vocab_size
    if stage == "sft":
        trees = documents(vocabulary, longest, (options.steps + WARM) * row_tokens)
        source = sft_source(trees, everything=True, tokens_per_step=row_tokens, **common)  # type: ignore[arg-type]
        visible = sum(len(one) ** 2 for one in trees) / sum(map(len, trees)) / 2
        objective: Objective[Any] = SftObjective()
        per_item = 1.0
    else:
        trunk.add_head(stage, reward.HEAD, spread=0.01, seed=0)
        per_step = row_tokens * 4 // (3 * longest)
        asked = questions(vocabulary, longest, per_step * (options.steps + WARM))
        source = reward_source(asked, questions_per_step=per_step, **common)  # type: ignore[assignment, arg-type]
        visible = (longest / 4) ** 2 / 2 + 4 * longest / 8 * (longest / 4 + longest / 16)
        visible /= 3 * longest / 4
        objective = reward.RewardObjective(stage)
        per_item = 6.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    work = source.total_work
    seconds = list(trained(trunk, objective, source, stage))
    items = work * per_item / len(seconds) / float(np.median(seconds[WARM:]))
    tokens = items if stage == "sft" else items / 6 * 3 * longest / 4
    needed = flops_per_token(base.config, full=full, visible=visible, scored=stage == "sft")
    rate = matrix_rate(device, precision, 256 if tiny else 8192)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    found = {"per_second": items, "share_of_peak": tokens * needed / rate, "gigabytes": peak / 1e9}
    unit = "tokens/s" if stage == "sft" else "pairs/s"
    print(
        f"{shape:5} {stage:7} {method:5} {items:12,.0f} {unit:9} {found['share_of_peak']:6.2f} of the peak "
        f"{found['gigabytes']:7.1f} GB",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be repeated (1b and 7b)")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; to see that the script runs: --device cpu --shape tiny")
    found: dict[str, float] = {}
    for shape in options.shape or ["1b", "7b"]:
        for stage, method in (("sft", "lora"), ("sft", "full"), ("reward", "lora")):
            if (shape, method) == ("7b", "full"):
                continue
            result = case(shape, stage, method, options)
            found |= {f"{shape}_{stage}_{method}_{name}": round(value, 3) for name, value in result.items()}
            if options.device == "cuda":
                torch.cuda.empty_cache()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
