"""Dump to preferences, in MB of Posts.xml a second, against the way in which the original data set was built.

    python benchmarks/data.py [--quick] [--pairs 5] [SITE...]

SITE is a folder with a Posts.xml; their posts are repeated, under new ids, up to the size that is needed. Without one
the embedded community is taken, whose posts are plain and say little about real ones.

The other side is a row parser (lxml) and `markdownify` on every body, and nothing else: no join, no scores, no pairs,
no file written. Our side does all of it: parse, convert, join, find near-copies, score, pair, split, write. Both run in
turn in processes of their own, imports not counted, each bound to one core; then ours on two. The table splits our time
on one core: parse (a pass over the rows that does nothing else), convert (the rest of what a piece takes), join, write.

Memory is the most that all processes of a build hold together, sampled 20 times a second, on two cores, for 150 MB and
for 3 GB of input (`--quick`: 150 MB and 1 GB). The last line is one JSON object: `one_core` and `two_cores`, our MB/s
over the other side's (medians over pairs of runs), and `memory_growth`, the larger build's memory over the smaller's,
minus 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import psutil

MB = 1_000_000
ID_STEP = 10_000_000
FRACTIONS = {"sft": 0.3, "reward": 0.35, "judge": 0.15, "ppo": 0.1, "eval": 0.1}
# A quote inside a text is always escaped, so this finds attributes and nothing else.
_IDS = re.compile(rb'(?<= Id=")\d+|(?<= ParentId=")\d+|(?<= AcceptedAnswerId=")\d+')
_ROW = re.compile(rb"<row\s[^\n]*\n")


def enlarge(sites: Sequence[Path], out: Path, size: int) -> None:
    """One Posts.xml of about `size` bytes out of the rows of several, repeated under new ids."""
    lots = [b"".join(_ROW.findall((site / "Posts.xml").read_bytes())) for site in sites]
    # The texts between the ids, and the ids: so a copy is a join and no search.
    parted = [(_IDS.split(lot), [int(number) for number in _IDS.findall(lot)]) for lot in lots]
    written, offset = 0, 0
    with out.open("wb") as file:
        file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n')
        while written < size:
            for texts, ids in parted:
                shifted = [b"%d" % (number + offset) for number in ids]
                written += file.write(b"".join(chain.from_iterable(zip(texts, [*shifted, b""], strict=True))))
                offset += ID_STEP
        file.write(b"</posts>\n")


def theirs(path: Path) -> dict[str, float]:
    """Rows and markdownify over a file."""
    import markdownify
    from lxml import etree

    start = time.perf_counter()
    for _, row in etree.iterparse(path, tag="row"):
        markdownify.markdownify(row.get("Body") or "")
        row.clear()
        while row.getprevious() is not None:
            del row.getparent()[0]
    return {"seconds": time.perf_counter() - start}


def ours(path: Path, processes: int) -> dict[str, float]:
    """The whole data stage over a file, by step, with the recipe's defaults."""
    from stackllama.data.building import build
    from stackllama.data.building.gathering import Tell
    from stackllama.data.dump.rows import rows
    from stackllama.data_settings import build_settings
    from stackllama.recipe_load import load_recipe

    seconds: dict[str, float] = {}

    @contextmanager
    def show(title: str, _: str) -> Iterator[Tell]:
        start = time.perf_counter()
        yield lambda *_: None
        seconds[title.removeprefix("data: ")] = time.perf_counter() - start

    settings = build_settings(load_recipe("smollm2-beer", {"data.source": str(path)}))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        start = time.perf_counter()
        sources = build.sources([path], "example.com")
        machine = build.Machine(processes)
        target = Path(folder) / "data"
        build.build(
            sources, target, settings, machine, ledger=target / "ledger.parquet", fingerprint=str(path), show=show
        )
        seconds["seconds"] = time.perf_counter() - start
    if processes == 1:
        start = time.perf_counter()
        with path.open("rb") as stream:
            for _ in rows(stream, table="Posts").lots():
                pass
        seconds["parse"] = time.perf_counter() - start
    return seconds


def run(side: str, path: Path, cores: int) -> dict[str, float]:
    """What one side takes for a file, in a process of its own on that many cores; and its peak memory, in MB."""
    command = [sys.executable, __file__, "--side", side, "--cores", str(cores), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _memory(watched))
            time.sleep(0.05)
        assert process.stdout is not None
        told = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{side} failed with code {process.returncode}")
    return {**json.loads(told.splitlines()[-1]), "peak": peak / MB}


def _memory(process: psutil.Process) -> int:
    """Bytes that a process and all below it hold."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.Error:  # one has just ended
        return 0
    return total


def speeds(sites: Sequence[Path], folder: Path, pairs: int, sizes: tuple[int, int]) -> dict[str, float]:
    """Print the table of speeds; gives both ratios."""
    small, large = folder / "small.xml", folder / "large.xml"
    for path, size in zip((small, large), sizes, strict=True):
        enlarge(sites, path, size)
    mb = {path: path.stat().st_size / MB for path in (small, large)}
    print(f"{pairs} pairs of runs: markdownify on {mb[small]:.0f} MB, ours on {mb[large]:.0f} MB")
    print("other MB/s   ours, 1 core   ratio   ours, 2 cores   ratio   parse  convert  join  write (s, 1 core)")
    ratios: dict[str, list[float]] = {"one_core": [], "two_cores": []}
    for _ in range(pairs):
        other = mb[small] / run("theirs", small, 1)["seconds"]
        alone, both = run("ours", large, 1), run("ours", large, 2)
        one, two = (mb[large] / seconds["seconds"] for seconds in (alone, both))
        ratios["one_core"].append(one / other)
        ratios["two_cores"].append(two / other)
        steps = (alone["parse"], alone["converting"] - alone["parse"], alone["joining"], alone["writing"])
        print(
            f"{other:10.2f}{one:15.1f}{one / other:8.2f}{two:16.1f}{two / other:8.2f}"
            f"{steps[0]:8.1f}{steps[1]:9.1f}{steps[2]:6.1f}{steps[3]:7.1f}",
            flush=True,
        )
    for name, values in ratios.items():
        print(f"{name}: median {median(values):.2f}, from {min(values):.2f} to {max(values):.2f}")
    return {name: round(median(values), 2) for name, values in ratios.items()}


def memory(sites: Sequence[Path], folder: Path, sizes: tuple[int, int]) -> dict[str, float]:
    """Print the memory for a small and a large input; gives its growth."""
    peaks = []
    for size in sizes:
        path = folder / "memory.xml"
        enlarge(sites, path, size)
        told = run("ours", path, 2)
        peaks.append(told["peak"])
        print(f"{size / MB:,.0f} MB: {told['peak']:.0f} MB held at most, {told['seconds']:.0f} s", flush=True)
    return {"memory_growth": round(peaks[1] / peaks[0] - 1, 3)}


def _embedded(folder: Path) -> list[Path]:
    from stackllama.data.synthetic.community import write_dump

    write_dump(folder / "embedded", questions=4000, seed=0, fractions=FRACTIONS)
    return [folder / "embedded"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sites", nargs="*", type=Path, metavar="SITE", help="a folder with a Posts.xml")
    parser.add_argument("--quick", action="store_true", help="smaller inputs and 3 pairs: less than 5 minutes")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs (default: 5)")
    parser.add_argument("--side", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        (path,) = options.sites
        print(json.dumps(theirs(path) if options.side == "theirs" else ours(path, options.cores)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sites = options.sites or _embedded(folder)
        numbers: dict[str, Any] = {}
        if options.quick:
            numbers |= speeds(sites, folder, min(3, options.pairs), (10 * MB, 150 * MB))
            numbers |= memory(sites, folder, (150 * MB, 1000 * MB))
        else:
            numbers |= speeds(sites, folder, options.pairs, (30 * MB, 300 * MB))
            numbers |= memory(sites, folder, (150 * MB, 3000 * MB))
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
