"""Putting together what makes a policy: recipe values to the source and the objectives of PPO, its rivals and DPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from stackllama.assembly import FINAL, SFT, Assembled, adapter, precision, stage_seed
from stackllama.model.roles import Trunk
from stackllama.objectives import advantages, dpo, kl, ppo, reward
from stackllama.objectives.scaling import ScoreShaping
from stackllama.recipe import Recipe
from stackllama.rollout import engine, vllm
from stackllama.rollout.experience import POLICY, ExperienceSource, PPOSettings
from stackllama.rollout.mismatch import Mismatch
from stackllama.tokens.forest import Tree

DIFFERENCE_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Nats a token that sampler and trainer may be apart in the mean, by the type of the matrix products."""


def experience(recipe: Recipe, folder: Path, assembled: Assembled, prompts: Sequence[Tree]) -> ExperienceSource:
    """The source of PPO and of its rivals, over a trunk that has policy and reward model (and a value of its own).

    folder: of the run. Errors: as for `_sampler`.
    """
    section, trunk = recipe.ppo, assembled.trunk
    return ExperienceSource(
        trunk,
        prompts,
        settings=_ppo_settings(recipe),
        sampling=engine.Sampling(
            seed=stage_seed(recipe, "ppo/sampling"),
            max_new_tokens=section.max_new_tokens,
            eos_id=assembled.tokenizer.eos_id,
        ),
        controller=_kl_controller(recipe),
        estimator=kl.ESTIMATORS[section.kl.estimator],
        shaping=ScoreShaping(scaling=section.reward_scaling, clip=section.reward_clip),
        estimate=_advantage_estimate(recipe),
        reward_role="reward",
        value_role=value_role(recipe) or POLICY,
        sampler=_sampler(recipe, folder, trunk),
        mismatch=mismatch(recipe),
    )


def _ppo_settings(recipe: Recipe) -> PPOSettings:
    """The numbers of the PPO source."""
    section = recipe.ppo
    return PPOSettings(
        rounds=section.steps,
        prompts=section.prompts_per_step,
        samples=section.samples_per_prompt,
        epochs=section.epochs,
        minibatches=section.minibatches,
        gamma=section.gamma,
        gae_lambda=section.gae_lambda,
        whiten=section.whiten,
        missing_eos_penalty=section.missing_eos_penalty,
        kl_in_reward=section.kl.charge == "reward",
        kl_stop=section.policy_kl_stop,
        row_tokens=recipe.compute.row_tokens,
        curriculum=math.ceil(section.curriculum * section.steps),
        value_warmup=section.value_warmup if value_role(recipe) else 0,
    )


def value_role(recipe: Recipe) -> str | None:
    """The role that has the value head: the policy, or one of its own; None where advantages come of rewards alone."""
    if recipe.ppo.advantage != "gae":
        return None
    return ppo.ValueObjective.role if recipe.ppo.value == "own" else ppo.PPOObjective.role


def add_value(trunk: Trunk, recipe: Recipe) -> None:
    """Give the trunk a value role that is what its reward model is: adapter or copy, and head. Dropout is PPO's."""
    role = ppo.ValueObjective.role
    if recipe.reward.method == "full":
        trunk.add_copy(role)
    else:
        trunk.add_adapter(role, replace(adapter(recipe.reward), dropout=recipe.ppo.lora.dropout), seed=0)
    trunk.add_head(role, ppo.HEAD, spread=0.0, seed=0)
    known = trunk.state("reward").items()
    trunk.load_state(role, {name.replace(f"head.{reward.HEAD}.", f"head.{ppo.HEAD}."): one for name, one in known})


def _sampler(recipe: Recipe, folder: Path, trunk: Trunk) -> engine.Sampler:
    """What the policy samples with, of the run in ``folder``; vLLM loads the weights that SFT left there.

    Raises:
        ModelError: when vLLM cannot load them, or the policy is nothing that it can be given.
    """
    section = recipe.ppo
    if section.sampler == "own":
        return engine.sample
    return vllm.VllmSampler(
        folder / SFT / FINAL,
        trunk,
        POLICY,
        longest=section.max_prompt_tokens + section.max_new_tokens,
        requests=section.prompts_per_step * section.samples_per_prompt,
    )


def mismatch(recipe: Recipe) -> Mismatch:
    """What sampler and trainer may differ by. Our own sampler gets no weights: they would be 1 up to rounding."""
    section = recipe.ppo
    limit = section.sampler_difference_limit
    return Mismatch(
        cap=None if section.sampler == "own" else section.importance_cap,
        limit=DIFFERENCE_LIMITS[precision(recipe)] if limit is None else limit,
    )


def _advantage_estimate(recipe: Recipe) -> advantages.Estimate | None:
    """How advantages come of rewards alone; None where a value head is asked too."""
    return None if recipe.ppo.advantage == "gae" else advantages.WITHOUT_VALUES[recipe.ppo.advantage]


def ppo_objective(recipe: Recipe) -> ppo.PPOObjective:
    """The terms that the recipe asks for."""
    section = recipe.ppo
    return ppo.PPOObjective(
        clip=section.clip,
        value=_value_loss(recipe) if value_role(recipe) == ppo.PPOObjective.role else None,
        entropy_bonus=section.entropy_bonus,
        kl_coefficient=section.kl.coefficient if section.kl.charge == "loss" else 0.0,
        kl_estimator=kl.ESTIMATORS[section.kl.estimator],
    )


def value_objective(recipe: Recipe) -> list[ppo.ValueObjective]:
    """That of a value role of its own; none where there is no such role."""
    return [ppo.ValueObjective(_value_loss(recipe))] if value_role(recipe) == ppo.ValueObjective.role else []


def _value_loss(recipe: Recipe) -> ppo.ValueLoss:
    return ppo.ValueLoss(recipe.ppo.value_clip, recipe.ppo.value_coefficient)


def dpo_objective(recipe: Recipe) -> dpo.DPOObjective:
    """The loss of pairs that the recipe asks for."""
    section = recipe.dpo
    smoothing = {"label_smoothing": section.label_smoothing} if section.label_smoothing else {}
    return dpo.DPOObjective(partial(dpo.LOSSES[section.loss], beta=section.beta, **smoothing), beta=section.beta)


def _kl_controller(recipe: Recipe) -> kl.Controller:
    """Who sets the price of KL."""
    section = recipe.ppo.kl
    if section.controller == "fixed":
        return kl.FixedController(section.coefficient)
    if section.controller == "stop":
        return kl.StoppingController(section.coefficient, section.target)
    return kl.AdaptiveController(section.coefficient, section.target, section.horizon)
