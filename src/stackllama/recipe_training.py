"""Sections of a recipe that say how something is trained: what all trained stages share, and how the policy is made.

A part of `recipe.py`, which has the others, and the checks that compare sections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Beta = Annotated[float, Field(ge=0, lt=1)]
Linear = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


class Section(BaseModel):
    """What all parts of a recipe share: unknown keys are errors, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True, validate_default=True
    )


class LoRA(Section):
    """Low-rank adapters, used where a stage's `method` is `lora`."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the update matrices.")
    alpha: float = Field(32.0, gt=0, description="Scale of the update; it is multiplied by alpha / rank.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of dropping an adapter's input; above 0 PPO's first step is not exact.",
    )
    targets: tuple[Linear, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Names of the linear layers that get an adapter (as the model has them).",
    )


class Optimization(Section):
    """What every trained stage has: adapters or full weights, and AdamW."""

    method: Literal["lora", "full"] = Field("lora", description="Train low-rank adapters, or all weights.")
    lora: LoRA = Field(default_factory=LoRA, description="The adapters, where `method` is `lora`.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Learning rate after warm-up: kept, or falling to 0 at the last step."
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="Fraction of all steps over which the rate rises from 0.")
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="Decoupled weight decay; biases, norms and heads have none."
    )
    clip_norm: float = Field(1.0, gt=0, description="Largest L2 norm of the gradient; a longer one is scaled down.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments.")


class KL(Section):
    """The penalty that keeps the policy near the SFT model."""

    controller: Literal["adaptive", "fixed", "stop"] = Field(
        "adaptive",
        description="Steer the coefficient to the target, keep it (fixed), or keep it and end the training after the "
        "batch whose KL has reached the target (stop).",
    )
    coefficient: float = Field(
        0.2, ge=0, description="Reward taken off per nat of KL at the start (the original: 0.2)."
    )
    target: float = Field(
        6.0, gt=0, description="KL of a response that the controller steers to, or stops at, in nats."
    )
    horizon: float = Field(10_000.0, gt=0, description="Episodes over which the controller acts; less is faster.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="Penalty of a token: log ratio (k1, unbiased), half its square (k2, never negative), or ratio - 1 "
        "- log ratio (k3, both).",
    )
    charge: Literal["reward", "loss"] = Field(
        "reward",
        description="Where the KL is charged: in each token's reward, or as a term of the loss (as GRPO's paper has "
        "it; the controller is then `fixed` or `stop`, and the estimator k2 or k3).",
    )


class WatchLimits(Section):
    """Where alarms begin: changes against the SFT model's answers to the same prompts, passed by the whole interval."""

    repetition: float | None = Field(0.1, gt=0, le=1, description="Most that the share of repeated 4-grams may rise.")
    fences: float | None = Field(
        0.05, gt=0, le=1, description="Most that the share of answers with empty or repeated code blocks may rise."
    )
    length: float | None = Field(2.0, gt=1, description="Most times that answers may be as long, or as short.")
    perplexity: float | None = Field(
        2.0, gt=1, description="Most times that the answers' perplexity under the SFT model may be as high."
    )
    distance: float | None = Field(
        1.0,
        gt=0,
        description="Most that the training reward may gain more than the judge, in standard deviations of their "
        "scores of the SFT model's answers.",
    )


class Watch(Section):
    """What is looked at while the policy is trained, on prompts held back from it; docs/hacking.md has the measures."""

    every: int | None = Field(
        10, ge=1, description="Batches between two evaluations; one more comes after the last. None: no watching."
    )
    prompts: int = Field(
        64, ge=2, description="Questions of the ppo split that are held back for it, but at most a quarter of those."
    )
    kl_bound: float = Field(
        12.0, gt=0, description="KL of a response, in nats, over which an evaluation's weights are not kept."
    )
    stop_on_alarm: bool = Field(True, description="Whether an alarm ends the training.")
    limits: WatchLimits = Field(default_factory=WatchLimits, description="Where alarms begin; none: never.")


class PPO(Optimization):
    """Proximal policy optimization against the reward model, and its rivals without a value head."""

    learning_rate: float = Field(1.4e-5, gt=0, le=1, description="Peak learning rate of AdamW (the original: 1.4e-5).")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate after warm-up: kept, or falling to 0 at the last step."
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="Fraction of all steps over which the rate rises from 0.")
    steps: int = Field(200, ge=1, description="Batches that are sampled and learned from.")
    prompts_per_step: int = Field(32, ge=1, description="Distinct questions in a batch.")
    samples_per_prompt: int = Field(2, ge=1, description="Responses sampled for each question.")
    curriculum: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of the batches over which longer questions come in, the shortest first; 0: all from the "
        "start.",
    )
    epochs: int = Field(4, ge=1, le=100, description="Passes over each batch (the original: 4).")
    minibatches: int = Field(4, ge=1, description="Optimizer steps in one pass; they divide a batch's prompts.")
    advantage: Literal["gae", "rloo", "grpo", "reinforce", "best"] = Field(
        "gae",
        description="What a response is measured by: a value head (gae, PPO), the prompt's other samples (rloo), all "
        "of the prompt's samples, in their deviations (grpo), or all other responses of the batch (reinforce); or the "
        "best of the prompt's samples alone is learned (best: rejection sampling).",
    )
    max_prompt_tokens: int = Field(512, ge=8, description="Longest prompt in tokens; a longer one is left out.")
    max_new_tokens: int = Field(128, ge=1, description="Longest response in tokens.")
    sampler: Literal["own", "vllm"] = Field(
        "own",
        description="What samples for training: our own sampler, or vLLM beside the trainer on one GPU (by adapters "
        "only; needs `stackllama[vllm]`).",
    )
    sampler_difference_limit: float | None = Field(
        None,
        gt=0,
        description="Mean difference of a token's log-probability by sampler and trainer, in nats, over which the "
        "stage ends; none: 0.001 where products are float32, 0.1 where they are bfloat16.",
    )
    importance_cap: float | None = Field(
        2.0,
        ge=1,
        description="With `sampler: vllm`, the largest weight of a token: its probability by the trainer over that by "
        "the sampler, cut there; none: no weights.",
    )
    gamma: float = Field(
        1.0, gt=0, le=1, description="Discount of a reward per token (the original: 1; `advantage: gae` only)."
    )
    gae_lambda: float = Field(
        0.95,
        ge=0,
        le=1,
        alias="lambda",
        description="Decay of advantage estimates per token (the original: 0.95; `advantage: gae` only).",
    )
    clip: float = Field(0.2, gt=0, lt=1, description="The policy's ratio counts within 1 - clip .. 1 + clip.")
    value_clip: float = Field(
        0.2, gt=0, description="Most that a value may move from the sampled one, in reward (`advantage: gae` only)."
    )
    value_coefficient: float = Field(
        0.1, ge=0, description="Weight of the value loss beside the policy loss (`advantage: gae` only)."
    )
    value: Literal["shared", "own"] = Field(
        "shared",
        description="What says the values, with `advantage: gae`: a head on the policy's own adapter (shared), or an "
        "adapter, or copy, of its own that starts as the reward model (own), at the price of its optimizer's memory "
        "and one more pass a step.",
    )
    value_warmup: int = Field(
        0,
        ge=0,
        description="Batches at the start from which the value alone learns, while the policy does not move "
        "(`advantage: gae` only).",
    )
    entropy_bonus: float = Field(
        0.0, ge=0, description="Weight of the mean entropy of a token, in nats, that the loss rewards; 0: none."
    )
    whiten: bool = Field(True, description="Whether a batch's advantages are given mean 0 and deviation 1.")
    reward_scaling: bool = Field(
        False, description="Whether scores are divided by the standard deviation of all scores so far."
    )
    reward_clip: float | None = Field(
        None, gt=0, description="Largest size of a score, in reward, after any scaling; a larger one is cut to it."
    )
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Reward taken off a response that does not end by itself."
    )
    ratio_guard: float = Field(10.0, gt=1, description="A minibatch whose mean ratio is above this is skipped.")
    policy_kl_stop: float | None = Field(
        0.15, gt=0, description="KL per token from the sampling policy, in nats, that ends a batch; none: never."
    )
    kl: KL = Field(default_factory=KL, description="The penalty that keeps the policy near the SFT model.")


class DPO(Optimization):
    """Direct preference optimization on the pairs of the reward split: a rival of PPO that neither samples nor asks the
    reward model. Texts are as long as `reward` allows.
    """

    learning_rate: float = Field(5e-5, gt=0, le=1, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Learning rate after warm-up: kept, or falling to 0 at the last step."
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Fraction of all steps over which the rate rises from 0.")
    loss: Literal["dpo", "ipo"] = Field(
        "dpo",
        description="Loss of a pair: logistic (dpo, Rafailov et al. 2023), or the squared distance from a fixed gap "
        "(ipo, Azar et al. 2023).",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="Reward per nat by which the policy's log-probability of an answer is above the SFT model's. Under "
        "ipo a better answer is to gain 1 / (2 beta) nats over a worse one. Less lets the policy go further away.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of the pairs that are taken to be the wrong way round (`loss: dpo` only)."
    )
    epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the reward split; fractions are allowed.")
    max_steps: int | None = Field(None, ge=1, description="Most optimizer steps, whatever `epochs` says.")
    questions_per_step: int = Field(16, ge=1, description="Questions, with all their answers, in one optimizer step.")
    answers_per_question: int = Field(
        8, ge=2, le=64, description="Most answers of a question; of more, a seeded choice."
    )


def ppo_contradictions(ppo: PPO) -> Iterator[str]:
    """Each pair of settings of PPO that cannot both hold, and what to change."""
    if ppo.prompts_per_step % ppo.minibatches:
        allowed = [n for n in range(1, ppo.prompts_per_step + 1) if ppo.prompts_per_step % n == 0]
        yield (
            f"ppo.minibatches = {ppo.minibatches} does not divide ppo.prompts_per_step = {ppo.prompts_per_step}; "
            f"allowed: {', '.join(map(str, allowed))}"
        )
    if ppo.whiten and ppo.prompts_per_step * ppo.samples_per_prompt < 2:
        yield "ppo.whiten = true needs at least two responses a step: raise ppo.samples_per_prompt, or set it to false"
    yield from _advantage_contradictions(ppo)
    if ppo.advantage == "gae" and ppo.value_warmup >= ppo.steps:
        yield (
            f"ppo.value_warmup = {ppo.value_warmup} leaves the policy none of ppo.steps = {ppo.steps} batches: lower "
            "it, or raise steps"
        )
    if ppo.advantage == "gae" and ppo.value_warmup and ppo.value_coefficient == 0:
        yield (
            f"ppo.value_warmup = {ppo.value_warmup} would learn nothing with ppo.value_coefficient = 0: raise that, or "
            "set value_warmup to 0"
        )
    if ppo.kl.charge == "loss":
        yield from _kl_loss_contradictions(ppo.kl)
    if ppo.kl.controller != "adaptive":
        return
    if ppo.kl.coefficient == 0:
        yield "ppo.kl.coefficient = 0 can never be adapted: set it above 0, or ppo.kl.controller to fixed"
    episodes = ppo.prompts_per_step * ppo.samples_per_prompt
    if episodes >= 5 * ppo.kl.horizon:  # one update at the largest error of 0.2 would turn the coefficient negative
        yield (
            f"ppo.kl.horizon = {ppo.kl.horizon:g} is too short for ppo.prompts_per_step * ppo.samples_per_prompt = "
            f"{episodes} episodes a step; make it more than {episodes / 5:g}"
        )


def dpo_contradictions(dpo: DPO) -> Iterator[str]:
    """Each pair of settings of DPO that cannot both hold, and what to change."""
    if dpo.loss == "ipo" and dpo.label_smoothing:
        yield (
            f"dpo.label_smoothing = {dpo.label_smoothing:g} is for dpo.loss = dpo; with dpo.loss = ipo every gap has "
            "an end anyway: set it to 0, or dpo.loss to dpo"
        )


def _advantage_contradictions(ppo: PPO) -> Iterator[str]:
    if ppo.advantage == "gae":
        return
    if ppo.advantage == "reinforce":
        if ppo.prompts_per_step * ppo.samples_per_prompt < 2:
            yield "ppo.advantage = reinforce compares the responses of a step: raise ppo.prompts_per_step to at least 2"
    elif ppo.samples_per_prompt < 2:
        yield (
            f"ppo.advantage = {ppo.advantage} compares the samples of a prompt: raise ppo.samples_per_prompt = "
            f"{ppo.samples_per_prompt} to at least 2"
        )
    if ppo.advantage == "best" and ppo.whiten:
        yield (
            "ppo.whiten = true would have all but the best samples unlearned, and ppo.advantage = best leaves them "
            "alone: set whiten to false"
        )


def _kl_loss_contradictions(kl: KL) -> Iterator[str]:
    if kl.controller == "adaptive":
        yield f"ppo.kl.charge = loss has a fixed price: set ppo.kl.controller = {kl.controller} to fixed or stop"
    if kl.estimator == "k1":
        # The mean of k1's gradient over the policy's own samples is 0, whatever the reference.
        yield f"ppo.kl.charge = loss cannot minimize ppo.kl.estimator = {kl.estimator}; set it to k3 or k2"
