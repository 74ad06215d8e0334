"""SFT and reward training on one GPU, ours and TRL's, with random weights of Llamas of 1B and 7B parameters.

    python benchmarks/gpu.py [--case 7b_sft_lora] [--sides ours,trl] [--trl-python PYTHON] [--device cuda]

A case is a shape, a stage and a method: `1b_sft_lora`, `1b_sft_full`, `1b_reward_lora`, `7b_sft_lora`,
`7b_reward_lora`. Each side of each runs in a process of its own: one that fails, or that finds too little memory, ends
no other, and the peak of memory on the GPU is its own. A side has `--seconds`; steps and ways of TRL that would begin
later are left out.

Both sides make steps of equal work in bf16 products, without activation checkpointing (`--checkpointing`: with it on
both sides), AdamW in fp32, adapters of rank 16 on all projections, the trunk under them in bf16 and weights that are
trained themselves in fp32. SFT: four documents of exactly `--length` tokens (2,048) a step; ours are one packed row,
TRL's a batch of four, which needs neither packing nor padding. `--vary` has documents of a quarter of that up to all of
it: ours are packed, TRL's packed or padded, whichever is faster. Reward: five questions a step of 512 tokens, each with
four answers of 256 and so six pairs; ours computes a question once, TRL once for each answer of each pair, in batches
as large as the card holds. TRL has the best of several ways (trl_gpu.py names them), and all of them are printed.

Rates are medians over the steps that count, tokens (or pairs) a second; beside them stand the shortest and the longest
of these steps, in seconds. The first three steps are not counted: they compile. The *share of the peak* is the FLOPs
that the mathematics needs (flops.py; a question once, on both sides) over the rate of 8192 x 8192 x 8192 bf16 products,
measured in the same process; the share of the rate of the model's own shapes stands beside it.

To see that all of it runs without a GPU: `--device cpu --shape tiny`. The last line is one JSON object: for each case
ours over TRL's (`7b_sft_lora`), our share of the peak (`7b_sft_lora_share_of_peak`), both sides' rates and gigabytes;
the name of the device and what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flops
import numpy as np
from trl_environment import TRAINING, python_with_trl

HERE = Path(__file__).resolve().parent
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
WORK = ("sft_lora", "sft_full", "reward_lora")
CASES = [f"{shape}_{work}" for shape in SHAPES for work in WORK if (shape, work) != ("7b", "sft_full")]
"""Training 7B in full takes 16 bytes a weight."""
RANK = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DOCUMENTS, QUESTIONS, ANSWERS = 4, 5, 4
"""Documents, or questions, a step; answers of a question."""
PAIRS = [(better, worse) for better in range(ANSWERS) for worse in range(better + 1, ANSWERS)]
WARM = 3
"""Steps that do not count: they compile, and the allocator learns what is asked for."""
RESULT = "RESULT "
"""How a line begins that a side reports by."""
RATES = ("matrix_rate", "own_rate")
"""What a share is a share of, as gpu_side.py measures it."""
GRACE = 10
"""Seconds after its time in which a side may end by itself."""


def documents(vocabulary: int, longest: int, steps: int, *, vary: bool) -> list[list[int]]:
    """Token ids of documents enough for so many steps."""
    random = np.random.default_rng(0)
    count = steps * DOCUMENTS * (2 if vary else 1)  # short ones are packed more than four to a row
    lengths = random.integers(longest // 4, longest + 1, count) if vary else [longest] * count
    return [random.integers(10, vocabulary, length).tolist() for length in lengths]


def questions(vocabulary: int, longest: int, count: int) -> list[dict[str, Any]]:
    """Questions of a quarter of the longest length with four answers of an eighth, each better than the next."""
    random = np.random.default_rng(0)
    sizes = [longest // 4, *[longest // 8] * ANSWERS]
    made = ([random.integers(10, vocabulary, size).tolist() for size in sizes] for _ in range(count))
    return [{"root": root, "branches": branches, "pairs": PAIRS} for root, *branches in made]


def job(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """What both sides are told. row_tokens: tokens of an SFT step; items: rows or pairs of a step of TRL's, each of
    item_tokens; square: the size of the matrices that the rate is measured by.
    """
    shape, stage, method = case.split("_")
    tiny = shape == "tiny"
    length = options.length or (64 if tiny else 2048)
    vocabulary, steps = 512 if tiny else 32000, options.steps + WARM
    heads = SHAPES[shape]["num_attention_heads"]
    told: dict[str, Any] = {
        "config": {
            **SHAPES[shape],
            "num_key_value_heads": heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": DOCUMENTS * length,
        },
        "stage": stage,
        "device": options.device,
        "threads": options.threads,
        "rank": RANK if method == "lora" else None,
        "alpha": 32.0,
        "targets": TARGETS,
        "checkpointing": options.checkpointing,
        "learning_rate": 1e-5,
        "steps": options.steps,
        "seconds": options.seconds,
        "length": length,
        "vary": options.vary,
        "compile": options.trl_compile,
        "row_tokens": DOCUMENTS * length,
        "tokens_per_step": DOCUMENTS * length,
        "questions_per_step": QUESTIONS,
        "in_order": False,
        "square": 256 if tiny else 8192,
        "skip": options.trl_skip,
        "profile": options.profile,
    }
    if stage == "sft":
        texts = documents(vocabulary, length, steps + 1, vary=options.vary)
        return {**told, "documents": texts, "items": DOCUMENTS, "item_tokens": length}
    asked = questions(vocabulary, length, QUESTIONS * (steps + 1))
    return {**told, "questions": asked, **_paired(asked), "item_tokens": 2 * (length // 4 + length // 8)}


def _paired(asked: list[dict[str, Any]]) -> dict[str, Any]:
    """The same questions as TRL takes them: each pair as two whole texts."""
    chosen = [one["root"] + one["branches"][better] for one in asked for better, _ in PAIRS]
    rejected = [one["root"] + one["branches"][worse] for one in asked for _, worse in PAIRS]
    return {"items": QUESTIONS * len(PAIRS), "pairs": {"chosen_ids": chosen, "rejected_ids": rejected}}


def flops_of_a_unit(told: dict[str, Any]) -> float:
    """What the mathematics needs for one token of SFT, or for one pair."""
    config, rank = SimpleNamespace(**told["config"]), told["rank"]
    if told["stage"] == "sft":
        return flops.per_token(config, rank=rank, seen=flops.visible([(len(one), ()) for one in told["documents"]]))
    trees = [(len(one["root"]), [*map(len, one["branches"])]) for one in told["questions"]]
    tokens = trees[0][0] + sum(trees[0][1])
    needed = flops.per_token(config, rank=rank, seen=flops.visible(trees), read=ANSWERS / tokens, vocabulary=False)
    return needed * tokens / len(PAIRS)


def started(python: Path, script: str, told: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What a side reported in a process of its own, and why it ended early ("" if it did not)."""
    path, out, err = (folder / f"{script}.{end}" for end in ("json", "out", "err"))
    path.write_text(json.dumps({**told, "deadline": time.time() + told["seconds"]}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with out.open("w") as stdout, err.open("w") as stderr:
        command = [str(python), str(HERE / f"{script}.py"), str(path)]
        side = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        try:
            code = side.wait(told["seconds"] + GRACE)
        except subprocess.TimeoutExpired:
            side.kill()
            side.wait()
            code = None
    lines = [line for line in out.read_text("utf-8", "replace").splitlines() if line.strip()]
    reported = [json.loads(line.removeprefix(RESULT)) for line in lines if line.startswith(RESULT)]
    for line in lines:
        if "does not fit" in line:
            print(f"    {line[:160]}")
    if code == 0:
        return reported, ""
    last = (err.read_text("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
    return reported, f"no end within {told['seconds']:.0f} s" if code is None else f"exit code {code}: {last[:300]}"


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The trials by name, and what was told of the machine."""
    trials = {one["trial"]: one for one in reports if "trial" in one}
    return {"trials": trials, **{k: v for one in reports if "device" in one for k, v in one.items()}}


def ours(told: dict[str, Any], folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    """Our side of a job."""
    reports, error = started(Path(sys.executable), "ours_gpu", told, folder)
    print("".join(one["profile"] for one in reports if "profile" in one), end="")
    return {**merged(reports), "error": error}


def trl(told: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """TRL's side of a job: all its ways, begun again behind one that ended the process, while there is time."""
    reports: list[dict[str, Any]] = []
    until = time.time() + told["seconds"]
    error = ""
    for _ in range(10):
        left = until - time.time()
        if left < told["seconds"] / 4:
            break
        skip = [*told["skip"], *(one["begun"] for one in reports if "begun" in one)]
        more, error = started(options.trl_python, "trl_gpu", {**told, "skip": skip, "seconds": left}, folder)
        reports += more
        known = {one["trial"] for one in reports if "trial" in one}
        died = [one["begun"] for one in reports if "begun" in one and one["begun"] not in known]
        reports += [{"trial": name, "error": error} for name in died]
        if not error or not more:
            break
    return {**merged(reports), "error": error}


def best(found: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest trial of a side."""
    done = [one for one in found["trials"].values() if "rate" in one]
    return max(done, key=lambda one: one["rate"], default=None)


def rows(side: str, found: dict[str, Any], needed: float) -> Iterator[str]:
    """Lines of the table: each trial of a side, the best one marked."""
    chosen = best(found)
    for name, one in found["trials"].items():
        label = f"{side} {name}".strip() + (f" x{one['batch']}" if "batch" in one else "")
        if "rate" not in one:
            yield f"    {label:34} failed: {one['error'][:200]}"
            continue
        shares = [one["rate"] * needed / found[rate] if rate in found else float("nan") for rate in RATES]
        yield (
            f"  {'*' if one is chosen else ' '} {label:34} {one['rate']:10,.1f} {shares[0]:6.3f} {shares[1]:6.3f} "
            f"{one['peak'] / 1e9:7.2f} {min(one['seconds']):8.3f} {max(one['seconds']):8.3f} {len(one['seconds']):5}"
        )
    if found["error"]:
        yield f"    {side}: {found['error']}"


def measure(case: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Print the table of a case; gives its numbers for the last line."""
    told = job(case, options)
    needed = flops_of_a_unit(told)
    unit = "tokens/s" if told["stage"] == "sft" else "pairs/s"
    heads = ("of peak", "of own", "GB", "shortest", "longest", "steps")
    print(f"{case:38} {unit:>10} {heads[0]:>6} {heads[1]:>6} {heads[2]:>6} {heads[3]:>8} {heads[4]:>8} {heads[5]:>5}")
    sides = {"ours": ours, "trl": trl}
    numbers: dict[str, Any] = {}
    failed: list[str] = []
    for side in options.sides:
        found = sides[side](told, folder, options)
        print("\n".join(rows(side, found, needed)), flush=True)
        more = summed(f"{case}_{side}", found, needed)
        failed += more.pop("failed", [])
        numbers |= more
    if f"{case}_ours_rate" in numbers and f"{case}_trl_rate" in numbers:
        numbers[case] = numbers[f"{case}_ours_rate"] / numbers[f"{case}_trl_rate"]
        print(f"    ours over TRL's: {numbers[case]:.2f}", flush=True)
    if f"{case}_ours_share" in numbers:
        numbers[f"{case}_share_of_peak"] = numbers.pop(f"{case}_ours_share")
        numbers[f"{case}_share_of_own_shapes"] = numbers.pop(f"{case}_ours_share_of_own")
    return {**numbers, "failed": failed}


def summed(name: str, found: dict[str, Any], needed: float) -> dict[str, Any]:
    """The numbers of a side's best trial under a name."""
    chosen = best(found)
    numbers: dict[str, Any] = {k: found[k] for k in ("device",) if k in found}
    if chosen is None:
        return {**numbers, "failed": [name]}
    numbers |= {f"{name}_rate": chosen["rate"], f"{name}_gigabytes": chosen["peak"] / 1e9}
    if "matrix_rate" in found:
        numbers |= {rate: found[rate] for rate in RATES}
        numbers[f"{name}_share"] = chosen["rate"] * needed / found["matrix_rate"]
        numbers[f"{name}_share_of_own"] = chosen["rate"] * needed / found["own_rate"]
    return numbers


def default_python() -> Path:
    """This interpreter if it has TRL, else that of an environment with it (made where it is missing)."""
    return Path(sys.executable) if find_spec("trl") else python_with_trl(TRAINING)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated (all of 1b and 7b)")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="all cases of a shape; may be repeated")
    parser.add_argument("--sides", default="ours,trl", help="ours, trl, or both with a comma between (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps that count (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="for a side of a case, at most (%(default)s)")
    parser.add_argument("--length", type=int, help="tokens of the longest document (2048)")
    parser.add_argument("--vary", action="store_true", help="documents of a quarter of the length up to all of it")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, on both sides")
    parser.add_argument("--profile", action="store_true", help="print our operators by time on the device")
    parser.add_argument("--trl-python", type=Path, help="an interpreter that has TRL")
    parser.add_argument("--trl-compile", action="store_true", help="try torch.compile for TRL too")
    parser.add_argument("--trl-skip", action="append", default=[], metavar="WAY", help="as printed; may be repeated")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    options.sides = options.sides.split(",")
    if not {*options.sides} <= {"ours", "trl"}:
        parser.error(f"--sides is {','.join(options.sides)}: allowed are ours and trl")
    return options


def main() -> None:
    options = read_options()
    shapes = options.shape or ([] if options.case else ["1b", "7b"])
    cases = [case for case in CASES if case in (options.case or ()) or case.split("_")[0] in shapes]
    if "trl" in options.sides:
        options.trl_python = options.trl_python or default_python()
    found: dict[str, Any] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for case in cases:
            numbers = measure(case, options, Path(name))
            failed += numbers.pop("failed")
            found |= numbers
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
    print(json.dumps({**rounded, "failed": failed}))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
