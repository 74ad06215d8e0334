"""Check what `make quickstart` wrote: each promise with its numbers. Exits with code 1 where one is broken."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

GOLD_RISE = 0.25
KL_SLACK = 1.5


def promises(summary: dict[str, Any], kl_target: float, folder: Path) -> Iterator[tuple[bool, str]]:
    """(whether it holds, what is promised, with the numbers as they came out)."""
    sft, reward, ppo, gold = (summary[part] for part in ("sft", "reward", "ppo", "gold"))
    before, after = sft["perplexity_before"], sft["perplexity_after"]
    yield after < before, f"held-out perplexity falls: {before:.2f} -> {after:.2f}"
    for name in ("longer", "earlier"):
        numbers = f"{reward['accuracy']:.3f} against {reward[f'{name}_wins']:.3f}"
        low = reward[f"over_{name}_low"]
        yield low > 0, f"reward accuracy is above {name}-wins: {numbers}, interval of the difference from {low:+.3f}"
    numbers = f"{gold['sft']:.3f} -> {gold['ppo']:.3f}, interval of the difference from {gold['low']:+.3f}"
    yield gold["difference"] >= GOLD_RISE and gold["low"] > 0, f"gold rises by at least {GOLD_RISE}: {numbers}"
    yield ppo["kl"] <= KL_SLACK * kl_target, f"KL is at most {KL_SLACK} times its target {kl_target:g}: {ppo['kl']:.2f}"
    page = folder / "report.html"
    yield page.is_file() and page.stat().st_size > 10_000, f"{page} exists"


def main() -> int:
    folder = Path(sys.argv[1])
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    broken = 0
    for holds, text in promises(summary, recipe["ppo"]["kl"]["target"], folder):
        print(f"{'ok    ' if holds else 'BROKEN'} {text}")
        broken += not holds
    print(f"{summary['seconds']['total']:.0f} seconds of work")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
