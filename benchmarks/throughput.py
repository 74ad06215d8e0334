"""How fast the parts run on this machine, on the embedded base model and the embedded community, warm, single process.

    python benchmarks/throughput.py [--seconds 5] [--threads N]

Prints a table and, as its last line, one JSON object: tokens per second of SFT (packed, all weights), questions and
pairs per second of reward training (LoRA), sampled tokens per second, and the bf16 and fp32 matrix product of the
model's own shape in GFLOP/s, all measured in one run. Times on shared machines are noisy: compare ratios of one run,
several runs, medians. Comparisons with other libraries are not here yet.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from stackllama.assembly import BF16_FEATURES
from stackllama.data.building import build
from stackllama.data.pairs.rules import PairRules
from stackllama.data.store import store
from stackllama.data.synthetic import community as synthetic
from stackllama.environment import processor_features
from stackllama.model.load import load_base
from stackllama.model.roles import REFERENCE, LoRA, Trunk
from stackllama.objectives import reward
from stackllama.objectives.sft import SftObjective
from stackllama.rollout.engine import Request, Sampling, sample
from stackllama.tokens.sources import encode_answers, encode_pairs, encode_prompts, reward_source, sft_source

ROW_TOKENS = 2048
ADAPTER = LoRA(16, 32.0, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
FRACTIONS = {"sft": 0.4, "reward": 0.4, "judge": 0.0, "ppo": 0.1, "eval": 0.1}


def rate(work: Callable[[], float], seconds: float) -> float:
    """Units of work per second: warm up once, then repeat for so many seconds."""
    work()
    start, done = time.perf_counter(), 0.0
    while (elapsed := time.perf_counter() - start) < seconds:
        done += work()
    return done / elapsed


def matrix_rate(dtype: torch.dtype, seconds: float) -> float:
    """GFLOP/s of (2048 x 256) times (256 x 688), the model's widest layer: 2 * 2048 * 256 * 688 FLOPs each."""
    left, right = torch.randn(2048, 256).to(dtype), torch.randn(688, 256).to(dtype)

    def products() -> float:
        for _ in range(50):
            torch.nn.functional.linear(left, right)
        return 50 * 2 * 2048 * 256 * 688 / 1e9

    return rate(products, seconds)


def measure(seconds: float) -> dict[str, float]:
    """Every figure, by name."""
    base = load_base("embedded", attention="forest")
    precision = torch.bfloat16 if BF16_FEATURES & set(processor_features()) else torch.float32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.write_dump(folder / "dump", questions=1000, seed=0, fractions=FRACTIONS)
        settings = build.Settings(FRACTIONS, PairRules(), build.Clustering(near_copies=False))
        dump = build.sources([folder / "dump"], synthetic.SITE)
        build.build(dump, folder, settings, build.Machine(), ledger=folder / "ledger.parquet", fingerprint=0)
        splits = {split: store.read_questions(folder, split) for split in ("sft", "reward", "ppo")}
    trunk = Trunk(base.model, precision=precision)
    trunk.add_copy("sft")
    trunk.add_adapter("reward", ADAPTER, seed=0)
    trunk.add_head("reward", reward.HEAD, spread=0.1, seed=0)
    endless = {"epochs": 1000, "max_steps": None, "seed": 0, "row_tokens": ROW_TOKENS}
    texts = encode_answers(base.tokenizer, splits["sft"], titles=True, answers="all", max_tokens=512)
    pairs = encode_pairs(
        base.tokenizer,
        splits["reward"],
        titles=True,
        answers_per_question=8,
        max_question_tokens=256,
        max_answer_tokens=128,
        row_tokens=ROW_TOKENS,
        by_pairs=False,
        seed=0,
    )
    learn = sft_source(texts.items, everything=False, tokens_per_step=2048, **endless)  # type: ignore[arg-type]
    rank = reward_source(pairs.items, questions_per_step=16, **endless)  # type: ignore[arg-type]
    prompts = encode_prompts(base.tokenizer, splits["ppo"], titles=True, max_tokens=256).items[:64]

    def sft_step() -> float:
        batch = learn.next()
        assert batch is not None
        with trunk.use("sft", training=True) as role:
            for row in batch.rows:
                SftObjective()(role, row).losses["loss"].backward()
        return float(batch.work)

    def reward_step() -> float:
        batch = rank.next()
        assert batch is not None
        with trunk.use("reward", training=True) as role:
            for row in batch.rows:
                reward.RewardObjective("reward")(role, row).losses["pairwise_loss"].backward()
        return float(batch.work)

    def sample_once() -> float:
        requests = [Request(at, tree.root) for at, tree in enumerate(prompts)]
        with trunk.use(REFERENCE) as role:
            return float(sum(len(one.tokens) for one in sample(role, requests, Sampling(0, 32, -1))))

    per_question = sum(len(one.pairs) for one in pairs.items) / len({one.tree.key for one in pairs.items})
    questions_rate = rate(reward_step, seconds)
    return {
        "sft_full_tokens_per_second": rate(sft_step, seconds),
        "reward_lora_questions_per_second": questions_rate,
        "reward_lora_pairs_per_second": questions_rate * per_question,
        "sampled_tokens_per_second": rate(sample_once, seconds),
        "matrix_bf16_gflops": matrix_rate(torch.bfloat16, seconds / 4),
        "matrix_fp32_gflops": matrix_rate(torch.float32, seconds / 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each figure")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.seconds)
    for name, value in found.items():
        print(f"{name:36} {value:12,.1f}")
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
