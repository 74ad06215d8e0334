"""Watching PPO as a recipe asks for it: what is looked at, with what, and which weights are left in the end."""

from __future__ import annotations

from collections.abc import Sequence

from stackllama.assembly import Assembled, load_roles, resampling, stage_seed
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

LOG = "watch.jsonl"


def watch(
    recipe: Recipe,
    run: Run,
    assembled: Assembled,
    source: Rounds,
    questions: Sequence[Question],
    prompts: Sequence[Tree],
) -> Watched:
    """PPO's source, watched on prompts of its split that it does not train on; the judge joins the trunk.

    questions: those that the prompts' keys are places in.
    """
    load_roles(assembled, run.folder, "judge")
    trunk, tokenizer, section = assembled.trunk, assembled.tokenizer, recipe.ppo.watch
    assert section.every is not None, "there is nothing to watch"

    def gold(prompt: Tree, answer: str) -> float:
        asked = questions[prompt.key]
        return synthetic.gold_score(question_text(asked.title if recipe.data.titles else "", asked.text), answer)

    look = look_at(
        trunk,
        tokenizer,
        prompts,
        Sampling(
            seed=stage_seed(recipe, "ppo/watch/sampling"),
            max_new_tokens=recipe.ppo.max_new_tokens,
            eos_id=tokenizer.eos_id,
        ),
        gold=gold if recipe.data.source == (EMBEDDED,) else None,
        row_tokens=recipe.compute.row_tokens,
    )
    settings = Settings(
        rounds=recipe.ppo.steps,
        every=section.every,
        kl_bound=kl_bound(recipe),
        stop=section.stop_on_alarm,
        limits=Limits(**section.limits.model_dump()),
        resampling=resampling(recipe),
    )
    return Watched(
        source,
        look,
        lambda: trunk.state(POLICY),
        settings=settings,
        log=JsonlLog(run.stage("ppo") / LOG),
        tell=lambda text: print(f"ppo: {text}"),
    )


def kl_bound(recipe: Recipe) -> float:
    """The KL, in nats, over which no weights are kept."""
    bound = recipe.ppo.watch.kl_bound
    return 2 * recipe.ppo.kl.target if bound is None else bound


def leave_best(watched: Watched, trunk: Trunk) -> dict[str, float | str | None]:
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
