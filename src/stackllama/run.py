"""A run is a folder: `runs/NAME/` with its recipe, its lineage, a folder for each stage, a summary and a report.

    recipe.yaml          every field of the recipe, written out
    lineage.json         by stage: what it was made from (hashes), what it made (hashes), versions, threads, processor
    STAGE/               the stage's own files; final weights in STAGE/final/
    STAGE/complete.json  written last: while it is missing, the stage goes on where it was
    summary.json         see summary.py

One process at a time: a lock on `.lock`. What a stage was made from is compared each time, so that a stage never goes
on from, or stands on, something that was made again differently.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from stackllama.environment import changes, environment
from stackllama.errors import RunError
from stackllama.files import (
    atomic_write_json,
    atomic_write_text,
    digest_json,
    is_temporary,
    raise_if_full,
    read_json,
    take_lock,
)
from stackllama.recipe import Recipe
from stackllama.recipe_load import flatten, load_recipe, to_yaml

STAGES = ("data", "sft", "reward", "judge", "ppo", "dpo", "evaluate")
"""In their order; each has a folder of that name."""

POLICY_STAGES = ("ppo", "dpo")
"""Those that make a policy. A run has one of them, which its recipe names (`policy`)."""

COMMANDS = {stage: stage for stage in STAGES} | {"judge": "reward"}
"""The command that makes a stage; `stackllama reward` trains the judge too."""

NEEDS: Mapping[str, tuple[str, ...]] = {
    "data": (),
    "sft": ("data",),
    "reward": ("data", "sft"),
    "judge": ("data", "sft"),
    "ppo": ("data", "sft", "reward", "judge"),
    "dpo": ("data", "sft", "reward", "judge"),
    "evaluate": ("data", "sft", "reward", "judge"),
}
"""What a stage is made from, whatever makes the policy; `needs` adds that. The judge steers no step of a policy's
training, but says which weights it leaves; DPO is watched by reward model and judge, and learns from neither."""

FIRST_TOUCHED: dict[str, str | None] = {
    "seed": "data",
    "data.address": None,  # whence an archive came does not matter, its hash is noted
    "base": "sft",
    "compute.dtype": "sft",
    "compute.row_tokens": "sft",
    "evaluate.perplexity_answers": "sft",
    "evaluate.resamples": "sft",
    "evaluate.confidence": "sft",
    "guard": "sft",
    "reward.method": "sft",  # a stage that trains in full makes the trunk fp32
    "ppo.method": "sft",
    "dpo.method": "sft",
    "policy": "ppo",  # the first of the two: a run that has begun either keeps it
    "watch": "ppo",
    **{stage: stage for stage in STAGES},
}
"""First stage that a key, or any key of a section, changes. None, and keys that are not here, change nothing that is
kept."""

SAMPLED_AS = ("ppo.max_prompt_tokens", "ppo.max_new_tokens")
"""Keys of PPO by which a policy is watched and examined, whatever made it."""

_FORMAT = 1
_RECIPE = "recipe.yaml"
_OWN_FILES = (_RECIPE, "lineage.json", ".lock")
LM_EVAL = "lm_eval.json"
"""What `stackllama lm-eval` writes into the folder of the evaluation, whether that has begun or not."""
_ASIDE = ("seconds.json", LM_EVAL)
"""What may lie in a stage's folder before the stage has made anything: its clock, where it failed early, and the
above."""


class Run:
    """An open, locked run folder. Use it in a `with`; made by `open_run`."""

    def __init__(
        self, folder: Path, *, policy: str, recipe_digest: str, threads: int, lock: int, found: frozenset[str]
    ) -> None:
        self.folder = folder
        self._policy = policy
        self._recipe_digest = recipe_digest
        self._threads = threads
        self._lock: int | None = lock
        self._stays = found  # what `close` does not remove: names of own files, and "." for the folder itself

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def stage(self, stage: str) -> Path:
        """The folder of a stage, whether it exists or not."""
        assert stage in STAGES, stage
        return self.folder / stage

    def is_complete(self, stage: str) -> bool:
        """Whether the stage has ended. Errors: RunError where it was made from something that has changed since."""
        marker = self._marker(stage)
        if marker is None:
            return False
        self._refuse_other_inputs(stage, marker["inputs"])
        return True

    def outputs(self, stage: str) -> dict[str, str]:
        """Name -> hash of what a complete stage made. Errors: RunError where it is not complete."""
        marker = self._marker(stage)
        if marker is None:
            raise self._missing(stage, needed_by=None)
        return dict(marker["outputs"])

    def require(self, stage: str) -> None:
        """Check that all that a stage is made from is complete. Errors: RunError with the command to type first."""
        for earlier in needs(stage, self._policy):
            if not self.is_complete(earlier):
                raise self._missing(earlier, needed_by=stage)

    def begin(
        self, stage: str, *, inputs: Mapping[str, str] | None = None, accelerator: str | None = None
    ) -> list[str]:
        """Begin a stage, or go on with it: makes its folder, and notes what it is made from and where.

        `inputs`: name -> hash of what comes from outside (a dump, a base model). What comes from earlier stages is
        added here. `accelerator`: the GPU that computes. Returns remarks for the user: why the bits of a resumed stage
        will differ from an unbroken one's.

        Errors: RunError where an earlier stage is missing, or the stage was begun from other inputs.
        """
        self.require(stage)
        made_from = self._made_from(stage) | dict(inputs or {})
        here, lineage = environment(self._threads, accelerator), self.lineage()
        before = lineage["stages"].get(stage)
        remarks: list[str] = []
        if before is not None and self._has_begun(stage):
            if _is_bound(self.folder, stage):
                self._refuse_other_inputs(stage, before["inputs"], made_from)
            remarks = [
                f"{change}: {stage} goes on, but its bits will differ"
                for change in changes(before["environment"], here)
            ]
        self._make(self.stage(stage))
        lineage["recipe"] = self._recipe_digest
        lineage["stages"][stage] = {"inputs": made_from, "outputs": {}, "environment": here}
        atomic_write_json(self.folder / "lineage.json", lineage)
        return remarks

    def finish(self, stage: str, *, outputs: Mapping[str, str]) -> None:
        """Mark a stage as complete. `outputs`: name -> hash of what it made."""
        lineage = self.lineage()
        assert stage in lineage["stages"], f"{stage} was finished but not begun"
        lineage["stages"][stage]["outputs"] = dict(outputs)
        atomic_write_json(self.folder / "lineage.json", lineage)
        atomic_write_json(self.stage(stage) / "complete.json", {"stage": stage, **lineage["stages"][stage]})

    def lineage(self) -> dict[str, Any]:
        """What lineage.json holds: format, hash of the recipe, and the stages begun so far."""
        return _lineage(self.folder)

    def note_taken(self, stage: str, record: Mapping[str, Any], *, source: str) -> None:
        """Note in the lineage that a stage is another run's (`source`, its name); record: what complete.json says."""
        lineage = self.lineage()
        kept = {key: record[key] for key in ("inputs", "outputs", "environment")}
        lineage["recipe"] = self._recipe_digest
        lineage["stages"][stage] = {**kept, "from": source}
        atomic_write_json(self.folder / "lineage.json", lineage)

    def close(self) -> None:
        """Let go of the folder. Where no stage has written anything, nothing that was made here is left behind.

        What was there before stays, and so does a recipe that an error points to.
        """
        if self._lock is None:
            return
        if not any(self._has_begun(stage) for stage in STAGES):
            self._remove_unused()
        os.close(self._lock)
        self._lock = None

    def _marker(self, stage: str) -> dict[str, Any] | None:
        return stage_record(self.folder, stage)

    def _made_from(self, stage: str) -> dict[str, str]:
        return {earlier: digest_json(self.outputs(earlier)) for earlier in needs(stage, self._policy)}

    def _refuse_other_inputs(self, stage: str, then: Mapping[str, str], now: Mapping[str, str] | None = None) -> None:
        if now is None:
            earlier = needs(stage, self._policy)
            now = {e: digest_json(m["outputs"]) for e in earlier if (m := self._marker(e)) is not None}
        changed = sorted(key for key in then.keys() & now.keys() if then[key] != now[key])
        if changed:
            raise RunError(
                f"{self.stage(stage)} was made from another {' and '.join(changed)} than there is now. Delete "
                f"{self.stage(stage)} and what follows it to make it again, or give the run another --name"
            )

    def _missing(self, stage: str, *, needed_by: str | None) -> RunError:
        self._stays |= {_RECIPE}  # the message points to it
        return _missing(self.folder, stage, needed_by=needed_by)

    def _remove_unused(self) -> None:
        """Remove what this run has made, while no stage has begun, unless there is something in it that is not ours."""
        for stage in STAGES:
            shutil.rmtree(self.stage(stage), ignore_errors=True)
        if _foreign(self.folder):
            return
        for name in _OWN_FILES:
            if name not in self._stays:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
        if "." not in self._stays:
            with contextlib.suppress(OSError):  # not empty where its recipe stays
                self.folder.rmdir()

    def _has_begun(self, stage: str) -> bool:
        return has_begun(self.folder, stage)

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise_if_full(error, folder)
            raise


def open_run(recipe: Recipe, folder: Path | None = None) -> Run:
    """Make the recipe's run folder, or open it again, and lock it.

    folder: where the run is, if that is not where its recipe puts it; for a run that was moved or is seen from inside.

    A folder whose recipe differs in a key that a begun stage depends on is refused; other changes are taken over.

    Errors: RunError for a folder that is no run, is in use by another process, holds another recipe, or cannot be made.
    """
    folder = folder or Path(recipe.folder) / recipe.name
    found = {"."} if folder.exists() else set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise_if_full(error, folder)
        raise RunError(f"{folder} cannot be made: {error.strerror}; choose another --name or --folder") from error
    if _foreign(folder) and not (folder / _RECIPE).is_file():
        raise RunError(f"{folder} holds other files and no recipe.yaml, so it is no run; choose another --name")
    lock = take_lock(folder / ".lock", folder, "choose another --name or --folder")
    try:
        stored = folder / _RECIPE
        found |= {name for name in (_RECIPE, "lineage.json") if (folder / name).exists()}
        if stored.is_file():
            _refuse_other_recipe(folder, load_recipe(stored), recipe)
        text = to_yaml(recipe)
        if not stored.is_file() or stored.read_text("utf-8") != text:
            atomic_write_text(stored, text)
    except BaseException:
        os.close(lock)
        raise
    digest = digest_json(recipe.model_dump(mode="json", by_alias=True))
    threads = recipe.compute.threads or available_threads()
    return Run(folder, policy=recipe.policy, recipe_digest=digest, threads=threads, lock=lock, found=frozenset(found))


def find_run(run: str, folder: str = "runs") -> Path:
    """The folder of a run that exists, given its path or its name. For reading only: takes no lock."""
    for path in (Path(run), Path(folder) / run):
        if (path / _RECIPE).is_file():
            return path
    known = sorted(path.parent.name for path in Path(folder).glob("*/recipe.yaml")) if Path(folder).is_dir() else []
    raise RunError(
        f"{run} is not a run; give a run's folder or name. In {folder}/ there is: {', '.join(known) or 'none'}"
    )


def needs(stage: str, policy: str) -> tuple[str, ...]:
    """What a stage is made from, in a run whose policy is made by the stage `policy`."""
    return (*NEEDS[stage], policy) if stage == "evaluate" else NEEDS[stage]


def policy_stage(folder: Path) -> str:
    """The stage that makes the policy of the run in `folder`, as its recipe says."""
    return load_recipe(folder / _RECIPE).policy


def stage_outputs(folder: Path, stage: str) -> dict[str, str]:
    """Name -> hash of what a stage of the run in `folder` made. For reading only: takes no lock.

    Errors: RunError where the stage is not complete.
    """
    marker = stage_record(folder, stage)
    if marker is None:
        raise _missing(folder, stage, needed_by=None)
    return dict(marker["outputs"])


def available_threads() -> int:
    """Processor threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def differing_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of everything in which two recipes differ."""
    before, after = flatten(old), flatten(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def first_touched(key: str, policy: str = "ppo") -> str | None:
    """The first stage whose result depends on a dotted key, in a run whose policy is made by the stage `policy`; None
    where none does.
    """
    first = _first_touched(key)
    if key.startswith("watch."):
        return policy
    if first in POLICY_STAGES and first != policy and key != "policy":
        return policy if key in SAMPLED_AS else None
    return first


def _first_touched(key: str) -> str | None:
    while key:
        if key in FIRST_TOUCHED:
            return FIRST_TOUCHED[key]
        key = key.rpartition(".")[0]
    return None


def _refuse_other_recipe(folder: Path, old: Recipe, new: Recipe) -> None:
    begun = [stage for stage in STAGES if _is_bound(folder, stage)]
    lines, again = [], set()
    for key, (before, after) in differing_keys(old, new).items():
        first = first_touched(key, new.policy)
        touched = [stage for stage in begun if first and STAGES.index(stage) >= STAGES.index(first)]
        if touched:
            lines.append(f"  {key}: {before} -> {after}")
            again.update(touched)
    if lines:
        folders = " ".join(str(folder / stage) for stage in STAGES if stage in again)
        raise RunError(
            f"{folder} was begun with another recipe (there -> given):\n" + "\n".join(lines) + "\n"
            f"Give this run another --name, or delete what was made with the old values: rm -r {folders}"
        )


def has_begun(folder: Path, stage: str) -> bool:
    """Whether a stage of the run in `folder` has made anything."""
    path = folder / stage
    return path.is_dir() and any(item.name not in _ASIDE and not is_temporary(item) for item in path.iterdir())


def _is_bound(folder: Path, stage: str) -> bool:
    """Whether what a stage has made is only for the recipe and the inputs that it was begun with.

    Data are from their manifest on. What comes before is work, which a build does not go on with for another recipe.
    """
    if stage == "data":
        return any((folder / stage / name).exists() for name in ("manifest.json", "complete.json"))
    return has_begun(folder, stage)


def _lineage(folder: Path) -> dict[str, Any]:
    path = folder / "lineage.json"
    if not path.exists():
        return {"format": _FORMAT, "recipe": "", "stages": {}}
    lineage = read_json(path)
    if not isinstance(lineage, dict) or lineage.get("format") != _FORMAT:
        raise RunError(f"{path} was written by another version of stackllama; give the run another --name")
    stages = lineage.get("stages")
    if not isinstance(stages, dict) or not all(_is_record(record) for record in stages.values()):
        raise RunError(f"{path} is damaged: stages is not what was written there; give the run another --name")
    return lineage


def _is_record(record: Any) -> bool:
    """Whether a value of lineage.json's stages says what a stage was made from and where, and what it made."""
    if not isinstance(record, dict) or not isinstance(record.get("environment"), dict):
        return False
    return _are_hashes(record.get("inputs")) and _are_hashes(record.get("outputs"))


def _are_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def stage_record(folder: Path, stage: str) -> dict[str, Any] | None:
    """What the complete.json of a stage of the run in `folder` holds, None where there is none. For reading only.

    Errors: RunError for a broken one.
    """
    path = folder / stage / "complete.json"
    if not path.exists():
        return None
    marker = read_json(path)
    if not _is_record(marker):
        raise RunError(f"{path} is not a stage's mark; delete {path.parent} and run {COMMANDS[stage]} again")
    return dict(marker)


def _missing(folder: Path, stage: str, *, needed_by: str | None) -> RunError:
    reason = f"{needed_by} needs {stage}, which" if needed_by else stage
    state = "is not complete" if has_begun(folder, stage) else "has not been run"
    first = shlex.join(["stackllama", COMMANDS[stage], str(folder / _RECIPE)])
    return RunError(f"{reason} {state} in {folder}; first type: {first}")


def _foreign(folder: Path) -> bool:
    """Whether a folder holds anything but the files that opening a run makes."""
    return any(item.name not in _OWN_FILES and not is_temporary(item) for item in folder.iterdir())
