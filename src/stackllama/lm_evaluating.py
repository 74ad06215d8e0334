"""`stackllama lm-eval`: SFT model and policy on tasks of EleutherAI's lm-evaluation-harness.

Training on preferences may cost what a model knew before (the "alignment tax"; Ouyang et al. 2022). The harness brings
tasks, prompts and metrics; the model is ours, read through the packed forest (`evaluate/harness.py`). So the numbers
are the harness's own, and can be put beside those of other models on equal versions of the tasks.

Nothing that the model writes is run: tasks marked as unsafe are refused. Code of data sets is never trusted. A task
file in --include-path may name functions of files beside it, which are run; so that folder is to be one's own.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackllama.assembly import Assembled, load_roles, load_trunk, prepare_machine, resampling, stage_seed
from stackllama.environment import package_version
from stackllama.errors import DataError, ModelError
from stackllama.evaluate.harness import Asked, HarnessModel
from stackllama.evaluate.harness_results import Found, side_by_side
from stackllama.files import atomic_write_json
from stackllama.model.roles import REFERENCE
from stackllama.recipe import Recipe
from stackllama.recipe_load import load_recipe
from stackllama.report import ability, tables
from stackllama.report.reading import policy_method
from stackllama.rollout.experience import POLICY
from stackllama.run import LM_EVAL, stage_outputs, stage_record
from stackllama.terminal import visible

BOOTSTRAP = 1000
"""Resamples of the harness for standard errors that have no formula; the harness's own 100,000 take minutes."""
OLDEST_DATASETS = 4
"""From this version on `datasets` runs no code of data sets, whatever a task asks for."""


Loaded = Mapping[str, Any]
"""What the harness's task manager loads: "tasks" and "groups" by name, with their data."""


def measure(folder: Path, names: Sequence[str], *, limit: int | None = None, include: Path | None = None) -> None:
    """Measure the run in `folder` on tasks of these names, print the table and write evaluate/lm_eval.json.

    limit: most documents of a task. include: a folder with task files of one's own. A run without a policy is measured
    with its SFT model alone.

    Raises:
        RunError: when SFT has not ended.
        ModelError: when the package is not installed, or a task does not fit the model.
        DataError: for a task that is unknown, cannot be loaded, or would run what the model writes.
    """
    check_installed()
    recipe = load_recipe(folder / "recipe.yaml")
    weights = {"sft": stage_outputs(folder, "sft")}
    with_policy = stage_record(folder, recipe.policy) is not None
    if with_policy:
        weights[recipe.policy] = stage_outputs(folder, recipe.policy)
    else:
        _say(f"{folder} has no finished {recipe.policy}, so the SFT model is measured alone")
    tasks = load_tasks(names, include)
    prepare_machine(recipe)
    assembled = load_trunk(recipe, folder)
    if with_policy:
        load_roles(assembled, folder, POLICY)
    found = {role: _found(recipe, assembled, role, tasks, limit) for role in (REFERENCE, POLICY)[: 1 + with_policy]}
    record = {
        "lm_eval": package_version("lm-eval"),
        "tasks": list(names),
        "limit": limit,
        "versions": {name: str(version) for name, version in found[REFERENCE].get("versions", {}).items()},
        "policy": recipe.policy if with_policy else None,
        "weights": weights,
        "confidence": recipe.evaluate.confidence,
        "resamples": recipe.evaluate.resamples,
        "rows": side_by_side(found[REFERENCE], found.get(POLICY), resampling(recipe)),
    }
    atomic_write_json(folder / "evaluate" / LM_EVAL, record)
    _show(record, recipe)
    _say(f"{folder / 'evaluate' / LM_EVAL}: written")


def check_installed() -> None:
    """Raise ModelError where the package is missing, or one that it needs is too old; neither is imported."""
    if find_spec("lm_eval") is None:
        raise ModelError("lm-eval needs the package lm-eval, which is not installed; pip install 'stackllama[lm-eval]'")
    version = package_version("datasets") or "0"
    if int(version.partition(".")[0]) < OLDEST_DATASETS:
        raise ModelError(
            f"datasets {version} runs code that comes with data sets; pip install 'stackllama[lm-eval]' brings one "
            "that does not"
        )


def load_tasks(names: Sequence[str], include: Path | None) -> Loaded:
    """Tasks, groups and tags by name, with their data. Errors: DataError as in `measure`."""
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise DataError(f"{include} is not a folder; give --include-path a folder with task files (*.yaml)")
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
            raise DataError(f"the harness has no task {name}; {hint}")
    _seed()
    built: list[Any] = []
    for name in dict.fromkeys(names):
        found = _load(manager, [name], name)
        for task_name, task in found["tasks"].items():
            _check_harmless(task_name, task)
        groups = found.get("groups", {})
        built += [groups[name]] if name in groups else found["tasks"].values()
    return _load(manager, built, " and ".join(names))  # together, which a task that two groups have does not go


def _load(manager: Any, wanted: list[Any], name: str) -> Loaded:
    """Tasks by name, or as they were loaded. What goes wrong with one, its data set first of all, has no error of its
    own in the harness: it may be any.
    """
    try:
        loaded: Loaded = manager.load(wanted)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            f"task {name} cannot be loaded ({type(error).__name__}: {reason}). Data sets come from the Hugging Face "
            "Hub: without a network they must be in its cache already"
        ) from error
    return loaded


def _seed() -> None:
    """Put the global generators where the harness's own command puts them: tasks may shuffle with them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _check_harmless(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"task {name} runs code that the model writes, which stackllama never does; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"task {name} shows images or sound, which this model cannot read; leave it out")


def _found(recipe: Recipe, assembled: Assembled, role: str, tasks: Loaded, limit: int | None) -> Found:
    """What the harness finds of one role. Seeds and examples are set as its `simple_evaluate` does, the same for both
    roles; that itself also lists every package of the machine, which takes longer than a small task.
    """
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    # Where it is not set the harness starts a process for each core, and each has torch.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    _seed()
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    model = HarnessModel(
        assembled.trunk,
        role,
        assembled.tokenizer,
        row_tokens=recipe.compute.row_tokens,
        seed=stage_seed(recipe, "evaluate/lm-eval"),
        progress=_progress("SFT model" if role == REFERENCE else "policy"),
    )
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        found: Found = evaluate(
            lm=adapted(model),
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            confirm_run_unsafe_code=False,
        )
    return found


def adapted(model: HarnessModel) -> Any:
    """The model as the harness wants it: an instance of its class, whose requests carry their arguments in `args`."""
    from lm_eval.api.model import LM

    class Adapted(LM):  # type: ignore[misc]
        """Hands requests on."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return model.loglikelihood([one.args for one in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return model.loglikelihood_rolling([one.args[0] for one in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return model.generate_until([one.args for one in requests])

    return Adapted()


def _progress(label: str) -> Callable[[Sequence[list[Asked]]], Iterable[list[Asked]]]:
    """A bar on stderr over the rows that are read."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda rows: track(rows, description=label, console=console)


def _show(record: Mapping[str, Any], recipe: Recipe) -> None:
    table = ability.table(record, policy_method(recipe.model_dump(mode="json")))
    if table is None:
        return
    for line in (*tables.lines(table), *ability.remarks(record)):
        print(visible(line))


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
