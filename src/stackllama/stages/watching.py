"""Watching a policy's training as a recipe asks: what is looked at, with what, and which weights are left."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from stackllama.assembly import Assembled, resampling, stage_seed
from stackllama.data.posts import Question
from stackllama.data.synthetic import community as synthetic
from stackllama.evaluate.hacking import Limits
from stackllama.evaluate.watch import Rounds, Settings, Watched, look_at
from stackllama.model.roles import Trunk
from stackllama.recipe import EMBEDDED, Recipe
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY
from stackllama.run import Run
from stackllama.tokens.forest import Tree
from stackllama.tokens.template import question_text
from stackllama.train.metrics import JsonlLog
from stackllama.train.trackers import TENSORBOARD, Log, tracked

RowT = TypeVar("RowT")

LOG = "watch.jsonl"
MOST_LOOKS = 40
"""At most so many while DPO trains: its steps are cheap beside a look, and the best of many looks is too good."""


def watch_log(recipe: Recipe, run: Run) -> AbstractContextManager[Log]:
    """Where looks are written, with TensorBoard beside it where the recipe asks for that.

    The other trackers have one open run a process, which is the training's: a second one would take its numbers.
    """
    stage = recipe.policy
    beside = [name for name in recipe.track if name == TENSORBOARD]
    return tracked(JsonlLog(run.stage(stage) / LOG), beside, run.folder, f"{stage}-watch")


def watch(
    recipe: Recipe,
    log: Log,
    assembled: Assembled,
    source: Rounds[RowT],
    rounds: int,
    questions: Sequence[Question],
    prompts: Sequence[Tree],
) -> Watched[RowT]:
    """The policy's source, watched on prompts of the ppo split that it does not train on.

    The trunk has the roles "reward" and "judge". rounds: of the whole training; questions: those that the prompts' keys
    are places in.
    """
    trunk, tokenizer, section = assembled.trunk, assembled.tokenizer, recipe.watch
    assert section.every is not None, "there is nothing to watch"

    def gold(prompt: Tree, answer: str) -> float:
        asked = questions[prompt.key]
        return synthetic.gold_score(question_text(asked.title if recipe.data.titles else "", asked.text), answer)

    look = look_at(
        trunk,
        tokenizer,
        prompts,
        Sampling(
            seed=stage_seed(recipe, "ppo/watch/sampling"),  # whatever makes the policy: rivals are looked at alike
            max_new_tokens=recipe.ppo.max_new_tokens,
            eos_id=tokenizer.eos_id,
        ),
        gold=gold if recipe.data.source == (EMBEDDED,) else None,
        row_tokens=recipe.compute.row_tokens,
    )
    settings = Settings(
        rounds=rounds,
        every=section.every if recipe.policy == "ppo" else max(section.every, -(-rounds // MOST_LOOKS)),
        kl_bound=section.kl_bound,
        stop=section.stop_on_alarm,
        limits=Limits(**section.limits.model_dump()),
        resampling=resampling(recipe),
    )
    return Watched(
        source,
        look,
        lambda: trunk.state(POLICY),
        settings=settings,
        log=log,
        tell=lambda text: print(f"{recipe.policy}: {text}"),
    )


def leave_best(watched: Watched[RowT], trunk: Trunk) -> dict[str, float | str | None]:
    """Put the chosen weights into the policy; gives what the summary says of it."""
    choice = watched.choice()
    if choice.weights is not None:
        trunk.load_state(POLICY, choice.weights)
    return {
        "steps": watched.rounds,
        "alarms": watched.alarming,
        "stopped_because": watched.stopped,
        "chosen_step": choice.step,
        "chosen_because": choice.reason,
    }
