"""`stackllama compare`: several runs side by side, as tables, as JSON or as a page."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stackllama.files import check_writable
from stackllama.report import comparison, rivals, seeds, tables
from stackllama.report.verdict import show
from stackllama.run import find_run
from stackllama.terminal import visible


def compare(options: Namespace) -> Path:
    """Compare the runs that are named; gives the folder of the first one.

    Errors: RunError where one is no run or has a stage missing, or the page cannot be written.
    """
    page = Path(options.page) if options.page else None
    if page is not None:
        check_writable(page, "give --page another file")
    folders = [find_run(run) for run in options.runs]
    several = rivals.groups(rivals.read_rivals(folders))
    if page is not None:
        from stackllama.report.comparison_page import write_page

        write_page(page, several, options.at)
        print(f"{page}: written", file=sys.stderr)
    if options.json:
        print(json.dumps(_numbers(several, options.at), indent=2))
    elif page is None:
        for line in _lines(several, options.at):
            print(visible(line))
    return folders[0]


def _numbers(several: list[rivals.Group], kl: float | None) -> dict[str, Any]:
    over = seeds.to_json(several, seeds.where(several, kl))
    return comparison.to_json(several, kl) | ({} if over is None else {"over_seeds": over})


def _lines(several: list[rivals.Group], kl: float | None) -> Iterator[str]:
    for group, exam, equal, where in comparison.shown(several, kl):
        yield from (*tables.lines(replace(exam, title=comparison.title(group, several))), "")
        if equal is not None:
            title = f"On the way, at {show(where)} nats of KL, on prompts held back; gains in SFT's deviations"
            yield from (*tables.lines(replace(equal, title=title)), "")
    for table in seeds.tables(several, seeds.where(several, kl)):
        yield from (*tables.lines(table), "")
    yield from comparison.remarks(several)
