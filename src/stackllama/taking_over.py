"""`--from RUN`: a new run that starts from the finished stages of another one, so that rivals share what they stand on.

What is taken over is every complete stage before the first one that a differing key of the recipe changes. Weights and
shards are never changed in place, so they are hard links where the file system has these; logs are, so they are copied,
like everything else. Checkpoints are left out: a complete stage goes on from none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackllama.errors import RunError
from stackllama.files import atomic_folder, digest_json, is_temporary
from stackllama.recipe import Recipe
from stackllama.recipe_load import load_recipe
from stackllama.run import (
    POLICY_STAGES,
    STAGES,
    Run,
    differing_keys,
    find_run,
    first_touched,
    has_begun,
    stage_outputs,
    stage_record,
)
from stackllama.summary import merge_summary, numbers_of, read_summary

LINKED = (".safetensors", ".parquet")
"""Endings of files that are written once, under another name, and replaced as a whole or not at all."""

LEFT_OUT = "checkpoints"

_SHOWN = 6
"""Differing keys that a message names."""


def find_source(run: str, recipe: Recipe) -> Path:
    """The folder of the run that a new run of this recipe is to start from, given its path or its name.

    Errors: RunError where it is no run, or the new run itself.
    """
    source = find_run(run, recipe.folder)
    if source.resolve() == (Path(recipe.folder) / recipe.name).resolve():
        raise RunError(f"--from {run} is this very run; give the new run another --name")
    return source


def take_over(recipe: Recipe, run: Run, source: Path) -> str:
    """Put the stages of the run at `source` that would be the same into the new run; gives a line for the user.

    Each stage appears whole, with its lineage and its numbers. The same call again, after a kill or later, takes over
    what is still missing, and nothing from the first stage on that this run has begun itself.

    Errors: RunError where this run was begun otherwise, or there is nothing to take over, or the other's numbers are
    broken.
    """
    name = source.resolve().name
    begun = [stage for stage in STAGES if has_begun(run.folder, stage)]
    stages = run.lineage()["stages"]
    if begun and name not in {stages[stage].get("from") for stage in begun if stage in stages}:
        raise RunError(
            f"{run.folder} has begun already ({', '.join(begun)}), and not from {source}: leave out --from to go on "
            "with it, or give the new run another --name"
        )
    touching = _touching(load_recipe(source / "recipe.yaml"), recipe)
    records, theirs = _unchanged(recipe, source, touching), read_summary(source)  # all that may be broken, first
    taken = []
    for stage, record in records.items():
        there = stage_record(run.folder, stage)
        if (there is None and has_begun(run.folder, stage)) or there not in (None, record):
            break
        if there is None:
            run.note_taken(stage, record, source=name)
            _link_or_copy(source / stage, run.stage(stage))
        taken.append(stage)
    merge_summary(run.folder, {"name": run.name, **numbers_of(theirs, taken)})
    return f"taken over from {source}: {', '.join(taken) or 'nothing more'}{_reason(recipe, taken, touching)}"


def _touching(old: Recipe, new: Recipe) -> dict[str, tuple[str, Any, Any]]:
    """Dotted key -> (the first stage that it changes, value there, value here) of what differs and changes any."""
    touching = {}
    for key, values in differing_keys(old, new).items():
        stage = first_touched(key, new.policy)
        if stage is not None:  # another way to a policy is told of the stage that makes it here
            touching[key] = (new.policy if stage in POLICY_STAGES else stage, *values)
    return touching


def _unchanged(recipe: Recipe, source: Path, touching: Mapping[str, tuple[str, Any, Any]]) -> dict[str, dict[str, Any]]:
    """Stage -> record of the complete stages of `source` that this recipe would make the same, in their order."""
    first = min((STAGES.index(stage) for stage, *_ in touching.values()), default=len(STAGES))
    records: dict[str, dict[str, Any]] = {}
    for stage in recipe.stages:
        record = stage_record(source, stage)
        if STAGES.index(stage) >= first or record is None or not _stands_on(record, records):
            break
        records[stage] = record
    if records:
        return records
    if first > 0:
        stage_outputs(source, recipe.stages[0])  # raises, and names the command to type
    keys = [
        f"{key} ({there} there, {here} here)"
        for key, (stage, there, here) in touching.items()
        if stage == recipe.stages[0]
    ]
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    raise RunError(
        f"nothing of {source} can be taken over, since what its first stage depends on differs: "
        f"{', '.join(keys[:_SHOWN])}{more}; set it as it is there, or leave out --from"
    )


def _stands_on(record: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a stage was made from the very stages that are taken over with it."""
    inputs = record["inputs"]
    return all(inputs[name] == digest_json(one["outputs"]) for name, one in records.items() if name in inputs)


def _link_or_copy(source: Path, target: Path) -> None:
    with atomic_folder(target) as folder:
        for path in sorted(source.rglob("*")):
            place = path.relative_to(source)
            if place.parts[0] == LEFT_OUT or any(is_temporary(Path(part)) for part in place.parts):
                continue
            if path.is_dir():
                (folder / place).mkdir()
            else:
                _put(path, folder / place)


def _put(path: Path, target: Path) -> None:
    if path.suffix in LINKED:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(path, target)
            return
    shutil.copyfile(path, target)


def _reason(recipe: Recipe, taken: list[str], touching: Mapping[str, tuple[str, Any, Any]]) -> str:
    """Why the next stage is this run's own; empty where there is none, or it is just not complete there."""
    after = [stage for stage in recipe.stages if stage not in taken]
    keys = [key for key, (stage, *_) in touching.items() if after and stage == after[0]]
    if not keys:
        return ""
    more = ", ..." if len(keys) > _SHOWN else ""
    verb = "differs" if len(keys) == 1 else "differ"
    return f"; {after[0]} is this run's own ({', '.join(keys[:_SHOWN])}{more} {verb})"
