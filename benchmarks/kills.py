"""PPO killed at random moments: whether it ends with the bits of a training that nobody disturbed.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--method lora]

A small run on the embedded community is trained up to its judge once. Then its PPO stage is made twice: undisturbed,
and killed with SIGKILL at random moments and gone on with, anew where it ends, until it was killed as often as asked
(with a checkpoint every second step, so that each life gets somewhere; what is lost is sampled and learned again).
Just before each kill the process is asked where it is, which the table shows.

The last line is one JSON object: kills by what they hit, and whether weights, log and watched evaluations are the same.
The exit code is 1 where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

RECIPE = """
base: {model: 0.2m, vocabulary: 600}
data: {source: embedded, questions: 400, splits: {sft: 0.3, reward: 0.3, judge: 0.15, ppo: 0.1, eval: 0.15}}
sft: {method: full, learning_rate: 2.0e-3, tokens_per_step: 1024, max_tokens: 256, answers: all, max_steps: 16}
reward: {lora: {rank: 4}, questions_per_step: 8, max_steps: 12, max_question_tokens: 192, max_answer_tokens: 96}
ppo: {method: METHOD, steps: 40, prompts_per_step: 16, samples_per_prompt: 2, epochs: 4, minibatches: 2,
  max_prompt_tokens: 192, max_new_tokens: 32, learning_rate: 1.0e-3}
watch: {every: 5, prompts: 8, stop_on_alarm: false}
evaluate: {prompts: 12, perplexity_answers: 20, resamples: 200}
compute: {device: cpu, threads: 1, checkpoint_steps: 2, log_steps: 1, row_tokens: 512}
"""

PROGRAM = """
import faulthandler, signal, sys
faulthandler.register(signal.SIGUSR1, all_threads=False)
from stackllama.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line, which tells where it is when it is asked to."""

PARTS = {
    "_sample": "sampling",
    "response_scores": "scoring",
    "_passes": "old and reference log-probabilities",
    "_evaluate": "watching",
    "save": "saving",
    "_apply": "an optimizer step",
    "next": "between steps",
    "_resume": "resuming",
}
"""Function of the project -> what goes on inside it; the innermost that is listed counts."""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words], cwd=folder, env=environment, text=True, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(folder: Path, *words: str) -> None:
    process = start(folder, *words)
    if process.wait():
        raise SystemExit((folder / "output.txt").read_text())


def kill(folder: Path, process: subprocess.Popen[str]) -> str | None:
    """Kill it and give what it was doing; None where it was not in the training yet, or had ended."""
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    found = re.findall(r'File ".*stackllama/(?!cli).*", line \d+ in (\w+)', (folder / "output.txt").read_text())
    if "train" not in found and "run_ppo" not in found:
        return None
    return next((PARTS[name] for name in found if name in PARTS), "the rest of the stage")


def kept(folder: Path) -> dict[str, str]:
    """What a training leaves, by name: hashes of its weights, of its log and of what was watched."""
    files = [folder / "final" / "role.safetensors", folder / "final" / "model.safetensors"]
    files += [folder / "metrics.jsonl", folder / "watch.jsonl"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--method", choices=("lora", "full"), default="lora")
    asked = options.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as name:
        base, whole, killed = (Path(name) / part for part in ("base", "whole", "killed"))
        whole.mkdir()
        (whole / "small.yaml").write_text(RECIPE.replace("METHOD", asked.method))
        for stage in ("data", "sft", "reward"):
            finish(whole, stage, "small.yaml")
        shutil.copytree(whole, base)
        begun = time.perf_counter()
        finish(whole, "ppo", "small.yaml")
        seconds = time.perf_counter() - begun
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        hit: Counter[str] = Counter()
        endings = []
        while sum(hit.values()) < asked.kills:
            shutil.rmtree(killed, ignore_errors=True)
            shutil.copytree(base, killed)
            while sum(hit.values()) < asked.kills and not (killed / "runs/small/ppo/complete.json").exists():
                process = start(killed, "ppo", "small.yaml")
                time.sleep(draw.uniform(0.2, 0.5) * seconds)
                part = kill(killed, process)
                if part is not None:
                    hit[part] += 1
                    print(f"kill {sum(hit.values()):2}: {part}", flush=True)
            finish(killed, "ppo", "small.yaml")
            endings.append(kept(killed / "runs" / "small" / "ppo"))
        one = kept(whole / "runs" / "small" / "ppo")
    same = {file: all(one[file] == two.get(file) for two in endings) for file in one}
    print(json.dumps({"kills": dict(hit), "trainings": len(endings), "same": same}))
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
