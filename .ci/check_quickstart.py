"""Check what `make quickstart` wrote: each line of the promise, with its numbers. Exits with code 1 if one is broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def promises(summary: dict[str, Any], kl_target: float, folder: Path) -> list[tuple[str, bool]]:
    """(what is promised, with the numbers as they came out; whether it holds)."""
    sft, reward, ppo, gold = (summary[part] for part in ("sft", "reward", "ppo", "gold"))
    before, after = sft["perplexity_before"], sft["perplexity_after"]
    page = folder / "report.html"
    return [
        (f"held-out perplexity falls: {before:.2f} -> {after:.2f}", after < before),
        (
            f"reward accuracy {reward['accuracy']:.3f} is above longer-wins {reward['longer_wins']:.3f}, "
            f"interval of the difference from {reward['over_longer_low']:+.3f}",
            reward["over_longer_low"] > 0,
        ),
        (
            f"reward accuracy {reward['accuracy']:.3f} is above earlier-wins {reward['earlier_wins']:.3f}, "
            f"interval of the difference from {reward['over_earlier_low']:+.3f}",
            reward["over_earlier_low"] > 0,
        ),
        (
            f"gold rises by at least 0.25: {gold['sft']:.3f} -> {gold['ppo']:.3f}, difference {gold['difference']:.3f}, "
            f"interval from {gold['low']:+.3f}",
            gold["difference"] >= 0.25 and gold["low"] > 0,
        ),
        (f"KL {ppo['kl']:.2f} is at most 1.5 times its target {kl_target:g}", ppo["kl"] <= 1.5 * kl_target),
        (f"{page} exists", page.is_file() and page.stat().st_size > 10_000),
    ]


def main() -> int:
    folder = Path(sys.argv[1])
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    broken = 0
    for text, holds in promises(summary, recipe["ppo"]["kl"]["target"], folder):
        print(f"{'ok    ' if holds else 'BROKEN'} {text}")
        broken += not holds
    print(f"{summary['seconds']['total']:.0f} seconds of work")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
