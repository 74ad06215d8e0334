"""Runs that are compared: what each stands on, by which method its policy was trained, and what came out.

Rivals are compared fairly where they stand on the same data, SFT model, reward model and judge, and sat the same exam.
Runs that do are one group; others stand apart. Runs of several seeds are told seed by seed (`seeds.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllama.errors import RunError
from stackllama.files import digest_json
from stackllama.report.equal_kl import last
from stackllama.report.figures import Log
from stackllama.report.reading import Run, coverage, number, policy_method, policy_stage, read_log, read_run
from stackllama.run import stage_outputs

SHARED = {"data": "data", "sft": "SFT model", "reward": "reward model", "judge": "judge"}
"""Stage -> what it makes, of those that rivals have in common."""

EXAM = "exam"

_EXAM_KEYS = (
    ("seed",),
    ("evaluate", "prompts"),
    ("evaluate", "max_new_tokens"),
    ("ppo", "max_prompt_tokens"),
    ("ppo", "max_new_tokens"),
)
"""Keys of the recipe that say which questions are asked, and how they are answered."""

_JOURNEY = ("base", "data", "sft", "reward")
"""Sections of a recipe that are the same where runs differ in their seed alone."""


@dataclass(frozen=True, slots=True)
class Rival:
    """One run. log: what was seen on held-back prompts while its policy was trained; stands_on: what it was made from,
    by hashes, and the exam.
    """

    name: str
    method: str
    seed: int
    stage: str
    run: Run
    log: Log
    stands_on: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that stand on the same."""

    rivals: Sequence[Rival]
    stands_on: Mapping[str, str]

    @property
    def best_of(self) -> Mapping[int, Rival]:
        """N of each best-of-n that was examined -> a run that did so."""
        found: dict[int, Rival] = {}
        for rival in self.rivals:
            if n := number(rival.run.summary, "best_of", "n"):
                found.setdefault(int(n), rival)
        return dict(sorted(found.items()))

    def kl(self) -> float | None:
        """Where to compare, in nats: at the bound of the largest best-of-n, else at the smallest final KL; None where
        no run was watched, or none has left the SFT model (an estimate of a KL near 0 may be negative).
        """
        finals = [nats for rival in self.rivals if (nats := last(rival.log)) is not None and nats > 0]
        for n in sorted(self.best_of, reverse=True):
            if finals:
                return number(self.best_of[n].run.summary, "best_of", "kl_bound")
        return min(finals, default=None)


def read_rivals(folders: Sequence[Path]) -> list[Rival]:
    """Read the runs in these folders.

    Errors: RunError where a folder is given twice, or a run has not been examined; it names the command to type.
    """
    twice = [folder for at, folder in enumerate(folders) if folder.resolve() in {f.resolve() for f in folders[:at]}]
    if twice:
        raise RunError(f"{twice[0]} is given twice; name each run once")
    names = [folder.resolve().name for folder in folders]
    return [
        _read(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def groups(rivals: Sequence[Rival]) -> list[Group]:
    """The runs by what they stand on, in the order in which they were given."""
    found: dict[str, list[Rival]] = {}
    for rival in rivals:
        found.setdefault(digest_json(dict(rival.stands_on)), []).append(rival)
    return [Group(tuple(members), members[0].stands_on) for members in found.values()]


def differs(several: Sequence[Group]) -> list[str]:
    """In what groups differ, in words."""
    words = {**SHARED, EXAM: "exam"}
    return [words[what] for what in words if len({group.stands_on[what] for group in several}) > 1]


def several_seeds(groups: Sequence[Group]) -> bool:
    """Whether the groups are the same journey under different seeds, each its own."""
    seeds = [{rival.seed for rival in group.rivals} for group in groups]
    journeys = {_journey(rival) for group in groups for rival in group.rivals}
    apart = len({seed for one in seeds for seed in one}) == len(groups)
    return len(groups) > 1 and all(len(one) == 1 for one in seeds) and apart and len(journeys) == 1


def _read(folder: Path, name: str) -> Rival:
    stage_outputs(folder, "evaluate")  # raises where it is missing
    run = read_run(folder)
    stage = policy_stage(run.recipe)
    stands_on = {part: digest_json(stage_outputs(folder, part)) for part in SHARED}
    return Rival(
        name=name,
        method=policy_method(run.recipe),
        seed=int(number(run.recipe, "seed") or 0),
        stage=stage,
        run=run,
        log=read_log(folder / stage / "watch.jsonl")[0],
        stands_on=stands_on | {EXAM: digest_json([coverage(run), *(number(run.recipe, *key) for key in _EXAM_KEYS)])},
    )


def _journey(rival: Rival) -> str:
    recipe = rival.run.recipe
    exam = [_at(recipe, key) for key in _EXAM_KEYS if key != ("seed",)]
    return digest_json([[recipe.get(section) for section in _JOURNEY], exam])


def _at(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
