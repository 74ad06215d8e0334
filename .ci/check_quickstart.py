"""Check what `make quickstart` wrote: each promise with its numbers. Exits with code 1 where one is broken."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GOLD_RISE = 0.25
KL_SLACK = 1.5


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised, with its numbers, and whether it holds."""

    holds: bool
    text: str


def promises(summary: dict[str, Any], kl_target: float, folder: Path) -> Iterator[Promise]:
    """All that the quickstart promises."""
    sft, reward, ppo, gold = (summary[part] for part in ("sft", "reward", "ppo", "gold"))
    before, after = sft["perplexity_before"], sft["perplexity_after"]
    yield Promise(after < before, f"held-out perplexity falls: {before:.2f} -> {after:.2f}")
    for name in ("longer", "earlier"):
        numbers = f"{reward['accuracy']:.3f} against {reward[f'{name}_wins']:.3f}"
        low = reward[f"over_{name}_low"]
        text = f"reward accuracy is above {name}-wins: {numbers}, interval of the difference from {low:+.3f}"
        yield Promise(low > 0, text)
    yield Promise(
        ppo["reward_difference_low"] > 0,
        f"PPO raises its reward: {ppo['reward_before']:.2f} -> {ppo['reward_after']:.2f}",
    )
    numbers = f"{gold['sft']:.3f} -> {gold['ppo']:.3f}, interval of the difference from {gold['low']:+.3f}"
    rises = gold["difference"] >= GOLD_RISE and gold["low"] > 0
    yield Promise(rises, f"gold rises by at least {GOLD_RISE}: {numbers}")
    kl = f"KL is at most {KL_SLACK} times its target {kl_target:g}: {ppo['kl']:.2f}"
    yield Promise(ppo["kl"] <= KL_SLACK * kl_target, kl)
    page = folder / "report.html"
    yield Promise(page.is_file() and page.stat().st_size > 10_000, f"{page} exists")


def main() -> int:
    folder = Path(sys.argv[1])
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    broken = 0
    for promise in promises(summary, recipe["ppo"]["kl"]["target"], folder):
        print(f"{'ok    ' if promise.holds else 'BROKEN'} {promise.text}")
        broken += not promise.holds
    print(f"{summary['seconds']['total']:.0f} seconds of work")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
