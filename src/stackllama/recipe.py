"""The recipe: one YAML file that states every stage of a run, as pydantic models.

Every field has a default (a recipe states only what differs), a unit and a sentence; unknown keys are errors; the
models are frozen. Checks that compare fields stand together in `contradictions`. Reading files, overrides and error
messages: `recipe_load.py`. Where a default comes from the original StackLLaMA recipe (April 2023), its field says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

EMBEDDED = "embedded"
EMBEDDED_TEXT = "embedded-text"
PUBLIC_DUMP = "https://archive.org/download/stackexchange"
SIZE = re.compile(r"\d+(\.\d+)?[mMbB]")

Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Linear = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _off(value: object) -> object:
    """YAML reads the bare word `off` as false."""
    return "off" if value is False else value


_OFF = BeforeValidator(_off)


class Section(BaseModel):
    """What all parts of a recipe share: unknown keys are errors, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True, validate_default=True
    )


class Base(Section):
    """The model that everything starts from. `base: MODEL` is short for `base: {model: MODEL}`."""

    model: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="The base model: `embedded` (shipped with the package), `smollm2-135m-instruct`, a Hub id, a "
        "folder, a GGUF file, or a size in parameters such as `3m` (random weights, and a tokenizer of the data).",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id; none means its default branch.")
    vocabulary: int = Field(
        1024,
        ge=260,
        le=262_144,
        description="Size of the tokenizer in tokens, when one is trained (`model` is a size).",
    )
    quantization: Annotated[Literal["off", "nf4"], _OFF] = Field(
        "off",
        description="Bits in which the weights of the linear layers are kept: those of `compute.dtype`, or 4 (NF4 with "
        "double quantization, Dettmers et al. 2023; adapters alone can be trained on them; needs "
        "`stackllama[qlora]`).",
    )


class Splits(Section):
    """How questions are shared out. They sum to 1; a question's cluster always falls into the same split."""

    sft: Fraction = Field(0.3, description="Fraction of the questions for supervised fine-tuning.")
    reward: Fraction = Field(0.35, description="Fraction for the reward model that PPO follows.")
    judge: Fraction = Field(0.15, description="Fraction for the judge, a reward model that PPO never sees.")
    ppo: Fraction = Field(0.1, description="Fraction whose questions are PPO's prompts.")
    eval: Fraction = Field(0.1, description="Fraction that is held out from all training.")


class Preferences(Section):
    """Which two answers of a question make a pair, and how much it counts; docs/preferences.md has the reasons."""

    score: Literal["log2", "votes"] = Field(
        "log2",
        description="Score of an answer: round(log2(1 + votes)), one more if accepted, -1 if negative (the original); "
        "or the votes themselves.",
    )
    conflict: Literal["score", "votes", "accepted", "drop"] = Field(
        "score",
        description="Where the accepted answer has fewer votes: the score decides (the original), the votes, or the "
        "accepted mark; or the pair is dropped.",
    )
    time: Annotated[Literal["off", "since_later"], _OFF] = Field(
        "since_later",
        description="Where Votes.xml dates every vote of a question: judge by the votes since the later answer's day, "
        "which both could have had; or by all votes (the original: off).",
    )
    skip_days: int = Field(0, ge=0, le=3650, description="Days after the later answer whose votes are left out too.")
    posted_within_days: int | None = Field(
        None, ge=0, description="Most days between two answers whose votes are not dated; none: any."
    )
    min_gap: int = Field(1, ge=1, description="Least difference of the two scores (the original: 1).")
    min_votes: int | None = Field(
        None, description="Fewest votes of the better answer; none: any, so that an accepted mark is enough."
    )
    margin: float = Field(
        0.0, ge=0, le=100, description="Reward by which a pair is to differ for each point of score gap, in its loss."
    )
    length_ratio: float | None = Field(
        None, ge=1, description="Most times that the longer answer is as long as the shorter; none: any."
    )
    near_copies: float | None = Field(
        0.8, ge=0.5, le=1, description="Resemblance of two answers from which on they are no pair; none: any."
    )
    weight: Literal["equal", "pairs", "votes"] = Field(
        "equal",
        description="What a question counts for in reward training: the same as any other, its number of pairs (the "
        "original), or log2(1 + votes of its answers).",
    )


class Cleaning(Section):
    """What is taken out of posts; docs/cleaning.md has the rules, the report of the data stage the counts."""

    control_tokens: Annotated[Literal["off", "break", "drop"], _OFF] = Field(
        "break",
        description="Texts that tokenizers of other tools read as control tokens, such as `<|im_end|>`: left as they "
        "are, broken by a space before their last character, or their post dropped.",
    )
    emails: Annotated[Literal["off", "mask", "drop"], _OFF] = Field(
        "mask",
        description="E-mail addresses: left as they are, replaced by `email@example.com`, or their post dropped.",
    )
    secrets: Annotated[Literal["off", "mask", "drop"], _OFF] = Field(
        "mask",
        description="Private keys, tokens of known forms, and passwords where one stands: left as they are, replaced "
        "by `REDACTED`, or their post dropped.",
    )
    link_only: Literal["keep", "drop"] = Field(
        "drop",
        description="Answers with links or images and, beside them, no code and fewer than 10 letters and digits.",
    )
    language: Annotated[Literal["off", "check", "drop"], _OFF] = Field(
        "check",
        description="Whether the language of each site is looked at (200 of its questions) and reported, and whether "
        "posts that are clearly in another one are dropped (never for `embedded`).",
    )


class Data(Section):
    """The dump and what is made of it."""

    source: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        min_length=1,
        description="Dumps: Posts.xml files, folders of tables or .7z archives, relative to the working directory; "
        "preference data of other tools: .parquet and .jsonl files, folders of them, or `hub:OWNER/NAME`; or "
        "`embedded` (the synthetic community); or `embedded-text` (plain text of its world, for pretraining).",
    )
    address: str = Field(
        PUBLIC_DUMP,
        min_length=1,
        description="Folder on the web from which `stackllama data fetch` downloads archives; nothing else looks at "
        "it. The default is the Internet Archive's item of the public dump.",
    )
    questions: int = Field(4000, ge=10, le=10_000_000, description="Questions to generate (source `embedded` only).")
    documents: int = Field(20_000, ge=10, description="Documents to generate (source `embedded-text` only).")
    titles: bool = Field(True, description="Whether a question's title stands above its body (the original: false).")
    max_pairs: int = Field(10, ge=1, le=1000, description="Most pairs taken from one question (the original: 10).")
    preferences: Preferences = Field(
        default_factory=Preferences, description="Which two answers of a question make a pair, and how much it counts."
    )
    cleaning: Cleaning = Field(default_factory=Cleaning, description="What is taken out of posts.")
    allow_truncated: bool = Field(False, description="Whether a dump that breaks off is used up to its last whole row.")
    splits: Splits = Field(default_factory=Splits, description="How the questions are shared out.")
    near_copies: bool = Field(
        True,
        description="Whether questions whose texts are nearly the same fall into one split, as one cluster (never for "
        "`embedded`, whose questions come from templates).",
    )
    links: Annotated[Literal["off", "duplicates", "all"], _OFF] = Field(
        "duplicates",
        description="Questions that PostLinks ties into one cluster: none, declared duplicates, or every linked pair.",
    )
    ledger: str | None = Field(
        None,
        description="File that remembers the split of every question, to be shared by runs on later dumps of a site; "
        "none: the run keeps its own.",
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


class SFT(Optimization):
    """Supervised fine-tuning on good answers (or on plain documents)."""

    epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the SFT split; fractions are allowed.")
    max_steps: int | None = Field(None, ge=1, description="Most optimizer steps, whatever `epochs` says.")
    tokens_per_step: int = Field(8192, ge=16, description="Tokens in one optimizer step (packed, without padding).")
    max_tokens: int = Field(
        1024, ge=16, description="Longest document (question and answer) in tokens; a longer one is left out."
    )
    answers: Literal["best", "all"] = Field("best", description="Learn each question's best answer, or all of them.")
    loss_on: Literal["answer", "all"] = Field("answer", description="Tokens that are learned: answers, or all.")


class Reward(Optimization):
    """The reward model; the judge is trained the same way on its own split."""

    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Learning rate after warm-up: kept, or falling to 0 at the last step."
    )
    epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the reward split (the original: 1).")
    max_steps: int | None = Field(None, ge=1, description="Most optimizer steps, whatever `epochs` says.")
    questions_per_step: int = Field(16, ge=1, description="Questions, with all their answers, in one optimizer step.")
    answers_per_question: int = Field(
        8, ge=2, le=64, description="Most answers of a question; of more, a seeded choice."
    )
    head_questions: int = Field(
        0, ge=0, description="Questions on which the head alone is fitted at first; 0: it starts random (the original)."
    )
    centring: float = Field(
        0.0,
        ge=0,
        description="How much the squared sum of a pair's two scores adds to the loss; it keeps scores near 0 "
        "(Eisenstein et al. 2023; TRL recommends 0.01).",
    )
    length_penalty: float = Field(
        0.0,
        ge=0,
        description="Reward that is not given for length: what a score may rise per natural log of an answer's tokens "
        "is less by this.",
    )
    max_question_tokens: int = Field(512, ge=8, description="Longest question in tokens; a longer one is left out.")
    max_answer_tokens: int = Field(512, ge=8, description="Longest answer in tokens; a longer one is left out.")


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
    """What is looked at while PPO trains, on prompts held back from it; docs/hacking.md explains the measures."""

    every: int | None = Field(
        10, ge=1, description="Batches between two evaluations; one more comes after the last. None: no watching."
    )
    prompts: int = Field(
        64, ge=2, description="Questions of the ppo split that are held back for it, but at most a quarter of those."
    )
    kl_bound: float | None = Field(
        None,
        gt=0,
        description="KL of a response, in nats, over which an evaluation's weights are not kept; none: twice "
        "`ppo.kl.target`.",
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
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of a reward per token (the original: 1).")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, alias="lambda", description="Decay of advantage estimates per token (the original: 0.95)."
    )
    clip: float = Field(0.2, gt=0, lt=1, description="The policy's ratio counts within 1 - clip .. 1 + clip.")
    value_clip: float = Field(0.2, gt=0, description="Most that a value may move from the sampled one, in reward.")
    value_coefficient: float = Field(0.1, ge=0, description="Weight of the value loss beside the policy loss.")
    value: Literal["shared", "own"] = Field(
        "shared",
        description="What says the values: a head on the policy's own adapter (shared), or an adapter, or copy, of its "
        "own that starts as the reward model (own), at the price of its optimizer's memory and one more pass a step.",
    )
    value_warmup: int = Field(
        0, ge=0, description="Batches at the start from which the value alone learns, while the policy does not move."
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
    watch: Watch = Field(default_factory=Watch, description="What is looked at while PPO trains.")


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


class Evaluate(Section):
    """What is measured after training, on the eval split."""

    prompts: int = Field(128, ge=2, description="Held-out questions answered by the SFT model and by the policy.")
    best_of: int = Field(
        0,
        ge=0,
        le=1024,
        description="Answers of the SFT model to each question, of which the one with the highest training reward is "
        "taken (best-of-n, Stiennon et al. 2020), as a third column beside SFT model and policy; 0: off, else at "
        "least 2.",
    )
    max_new_tokens: int | None = Field(None, ge=1, description="Longest answer in tokens; none: as in `ppo`.")
    resamples: int = Field(2000, ge=100, description="Bootstrap resamples behind each interval.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Coverage of each interval, as a fraction.")
    perplexity_answers: int = Field(200, ge=2, description="Held-out answers whose perplexity is measured.")
    side_by_side: int = Field(10, ge=0, le=1000, description="Pairs of answers shown in the report.")


class Guard(Section):
    """Faults of single steps, in every trained stage: what is compared with the last accepted steps, and what follows.

    Distances are in robust standard deviations above the median. Numbers that are not finite refuse their step whatever
    is set here.
    """

    watch: bool = Field(
        True, description="Whether loss, gradient norm, ratio and KL of a step are compared with the last ones."
    )
    window: int = Field(100, ge=10, le=10_000, description="Accepted steps whose numbers are the usual ones.")
    warmup: int = Field(50, ge=10, description="Accepted steps before anything is compared.")
    clip: float = Field(
        8.0, gt=0, description="Distance of a gradient norm from which it is scaled down, even below `clip_norm`."
    )
    skip: float = Field(12.0, gt=0, description="Distance of a number from which its step changes nothing.")
    rewind_after: int = Field(
        4,
        ge=2,
        le=20,
        description="Refused steps in a row after which weights go back to the newest checkpoint that is good; a step "
        "whose loss or KL is beyond `clip` counts one half.",
    )
    rewinds: int = Field(
        3, ge=0, description="Times that a stage may go back before it ends with an error; 0: it never goes back."
    )


class Compute(Section):
    """The machine. Nothing here changes what is learned, only how fast and in which bits (but for `checkpoint_steps`
    where the guard goes back).
    """

    threads: int | None = Field(
        None, ge=1, le=1024, description="Processor threads, and processes of the data stage; none: one for each core."
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="Where the data stage converts: processes of this machine, or a Ray cluster (RAY_ADDRESS)."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where models are trained and sampled; auto: on the GPU (CUDA) where there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of the weights in use; auto: bfloat16 where the device multiplies it in hardware."
    )
    recompute_activations: bool = Field(
        False,
        description="Keep one state of each layer and compute the rest again in the backward: less memory, slower.",
    )
    row_tokens: int = Field(2048, ge=32, description="Length of a packed row in tokens: the unit of memory.")
    checkpoint_steps: int = Field(
        50, ge=1, description="Optimizer steps between two checkpoints; the guard goes back to one of them."
    )
    log_steps: int = Field(10, ge=1, description="Optimizer steps between two lines of metrics.")


class Recipe(Section):
    """Everything that decides a run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        max_length=100,
        description="The run's name, and its folder inside `folder`; without it, the name of the recipe's file.",
    )
    folder: str = Field("runs", min_length=1, description="Where runs are kept, relative to the working directory.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random; never of facts or splits.")
    base: Base = Field(default_factory=Base, description="The model that everything starts from.")
    data: Data = Field(description="The dump and what is made of it.")
    policy: Literal["ppo", "dpo"] = Field(
        "ppo", description="How the policy is made: sampled and scored (ppo), or from the pairs themselves (dpo)."
    )
    sft: SFT = Field(default_factory=SFT, description="Supervised fine-tuning.")
    reward: Reward = Field(default_factory=Reward, description="The reward model, and the judge.")
    ppo: PPO = Field(default_factory=PPO, description="PPO against the reward model.")
    dpo: DPO = Field(default_factory=DPO, description="DPO on the reward split's pairs, where `policy` is `dpo`.")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="What is measured after training.")
    guard: Guard = Field(default_factory=Guard, description="Faults of single steps, in every trained stage.")
    compute: Compute = Field(default_factory=Compute, description="The machine.")

    @model_validator(mode="before")
    @classmethod
    def _short_base(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("base"), str):
            return {**values, "base": {"model": values["base"]}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = list(contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this recipe has, in order; a recipe on plain documents ends after SFT."""
        if self.data.source == (EMBEDDED_TEXT,):
            return ("data", "sft")
        return ("data", "sft", "reward", "judge", self.policy, "evaluate")

    @property
    def policy_section(self) -> PPO | DPO:
        """The section of the stage that makes the policy."""
        return self.ppo if self.policy == "ppo" else self.dpo


def is_size(model: str) -> bool:
    """Whether `base.model` asks for random weights of a size, such as `3m` or `16.5m`."""
    return SIZE.fullmatch(model) is not None


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Each pair of settings that cannot both hold: the keys, their values, and what to change.

    Sections of stages that the recipe does not have are not looked at.
    """
    yield from _data_contradictions(recipe)
    sft, row = recipe.sft, recipe.compute.row_tokens
    if sft.max_tokens > sft.tokens_per_step:
        yield (
            f"sft.max_tokens = {sft.max_tokens} is more than sft.tokens_per_step = {sft.tokens_per_step}: "
            "a document has to fit in a step; raise tokens_per_step or lower max_tokens"
        )
    for text, tokens in _longest_texts(recipe).items():
        if tokens > row:
            yield f"{text} does not fit in a row: compute.row_tokens = {row}; make it at least {tokens}"
    if "ppo" in recipe.stages:
        yield from _ppo_contradictions(recipe.ppo)
        yield from _sampler_contradictions(recipe)
    if "dpo" in recipe.stages:
        yield from _dpo_contradictions(recipe.dpo)
    if "evaluate" in recipe.stages and recipe.evaluate.best_of == 1:
        yield "evaluate.best_of = 1 has nothing to choose from; make it at least 2, or 0 for none"
    yield from _guard_contradictions(recipe.guard)
    yield from _base_contradictions(recipe)


def _sampler_contradictions(recipe: Recipe) -> Iterator[str]:
    ppo = recipe.ppo
    if ppo.sampler == "own":
        usual = PPO.model_fields["importance_cap"].default
        if ppo.importance_cap != usual:
            yield (
                f"ppo.importance_cap = {ppo.importance_cap} is for another sampler, and ppo.sampler = own computes as "
                f"the trainer does; leave it at {usual:g}, or set ppo.sampler to vllm"
            )
        return
    if ppo.method == "full":
        yield (
            "ppo.sampler = vllm is given adapters, but ppo.method = full trains all weights; set it to lora, or "
            "ppo.sampler to own"
        )
    if recipe.base.quantization != "off":
        yield (
            f"ppo.sampler = vllm cannot sample over base.quantization = {recipe.base.quantization}; set that to off, "
            "or ppo.sampler to own"
        )


def _base_contradictions(recipe: Recipe) -> Iterator[str]:
    model, quantization = recipe.base.model, recipe.base.quantization
    if is_size(model) and quantization != "off":
        yield (
            f"base.quantization = {quantization} freezes the base, but base.model = {model} starts from random "
            "weights; name a trained base, or set base.quantization to off"
        )
    elif quantization != "off":
        sections = {"sft": recipe.sft, "reward": recipe.reward, recipe.policy: recipe.policy_section}
        full = [f"{name}.method" for name, one in sections.items() if name in recipe.stages and one.method == "full"]
        if full:
            yield (
                f"base.quantization = {quantization} freezes the base, but {', '.join(full)} = full trains all its "
                "weights; set it to lora, or base.quantization to off"
            )
    elif is_size(model) and recipe.sft.method == "lora":
        yield f"base.model = {model} starts from random weights: sft.method must be full, not lora"


def _longest_texts(recipe: Recipe) -> dict[str, int]:
    """Tokens of the longest text that each stage may put in a row, by the settings that allow it."""
    sft, reward, ppo, sampled = recipe.sft, recipe.reward, recipe.ppo, recipe.evaluate.max_new_tokens
    texts = {f"sft.max_tokens = {sft.max_tokens}": sft.max_tokens}
    if "reward" in recipe.stages:
        asked, answered = reward.max_question_tokens, reward.max_answer_tokens
        text = f"reward.max_question_tokens + 2 * reward.max_answer_tokens = {asked} + 2 * {answered}"
        texts[text] = asked + 2 * answered
    if "evaluate" in recipe.stages:  # which samples as `ppo` says, whatever made the policy
        # An answer that is cut off gets one more token before it is scored, its EOS.
        text = f"ppo.max_prompt_tokens + ppo.max_new_tokens + 1 = {ppo.max_prompt_tokens} + {ppo.max_new_tokens} + 1"
        texts[text] = ppo.max_prompt_tokens + ppo.max_new_tokens + 1
        if sampled is not None:
            text = f"ppo.max_prompt_tokens + evaluate.max_new_tokens + 1 = {ppo.max_prompt_tokens} + {sampled} + 1"
            texts[text] = ppo.max_prompt_tokens + sampled + 1
    return texts


def _ppo_contradictions(ppo: PPO) -> Iterator[str]:
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
    if ppo.value_warmup and ppo.value_coefficient == 0:
        yield (
            f"ppo.value_warmup = {ppo.value_warmup} would learn nothing with ppo.value_coefficient = 0: raise that, or "
            "set value_warmup to 0"
        )
    if ppo.kl.charge == "loss":
        yield from _kl_loss_contradictions(ppo.kl)
    if ppo.kl.controller != "adaptive":
        return
    bound = ppo.watch.kl_bound
    if ppo.watch.every is not None and bound is not None and bound < ppo.kl.target:
        yield (
            f"ppo.watch.kl_bound = {bound:g} is below ppo.kl.target = {ppo.kl.target:g}, which the controller steers "
            "to: no weights would be kept; raise the bound, or lower the target"
        )
    if ppo.kl.coefficient == 0:
        yield "ppo.kl.coefficient = 0 can never be adapted: set it above 0, or ppo.kl.controller to fixed"
    episodes = ppo.prompts_per_step * ppo.samples_per_prompt
    if episodes >= 5 * ppo.kl.horizon:  # one update at the largest error of 0.2 would turn the coefficient negative
        yield (
            f"ppo.kl.horizon = {ppo.kl.horizon:g} is too short for ppo.prompts_per_step * ppo.samples_per_prompt = "
            f"{episodes} episodes a step; make it more than {episodes / 5:g}"
        )


def _dpo_contradictions(dpo: DPO) -> Iterator[str]:
    if dpo.loss == "ipo" and dpo.label_smoothing:
        yield (
            f"dpo.label_smoothing = {dpo.label_smoothing:g} is for dpo.loss = dpo; with dpo.loss = ipo every gap has "
            "an end anyway: set it to 0, or dpo.loss to dpo"
        )


def _guard_contradictions(guard: Guard) -> Iterator[str]:
    if guard.warmup > guard.window:
        yield (
            f"guard.warmup = {guard.warmup} is more than guard.window = {guard.window}, so that nothing would ever be "
            "compared: lower warmup, or raise window"
        )
    if guard.skip <= guard.clip:
        yield (
            f"guard.skip = {guard.skip:g} is not above guard.clip = {guard.clip:g}: a step is to be clipped before it "
            "is skipped; raise skip, or lower clip"
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
    for name in ("gamma", "gae_lambda", "value_clip", "value_coefficient", "value_warmup"):
        field = PPO.model_fields[name]
        if getattr(ppo, name) != field.default:
            yield (
                f"ppo.{field.alias or name} = {getattr(ppo, name):g} is for a value head, and ppo.advantage = "
                f"{ppo.advantage} has none; leave it at {field.default:g}, or set ppo.advantage to gae"
            )
    if ppo.value != "shared":
        yield (
            f"ppo.value = {ppo.value} is for values, and ppo.advantage = {ppo.advantage} has none; leave it at shared, "
            "or set ppo.advantage to gae"
        )


def _kl_loss_contradictions(kl: KL) -> Iterator[str]:
    if kl.controller == "adaptive":
        yield f"ppo.kl.charge = loss has a fixed price: set ppo.kl.controller = {kl.controller} to fixed or stop"
    if kl.estimator == "k1":
        # The mean of k1's gradient over the policy's own samples is 0, whatever the reference.
        yield f"ppo.kl.charge = loss cannot minimize ppo.kl.estimator = {kl.estimator}; set it to k3 or k2"


def _data_contradictions(recipe: Recipe) -> Iterator[str]:
    source, fractions = recipe.data.source, recipe.data.splits.model_dump()
    for word in (EMBEDDED, EMBEDDED_TEXT):
        if word in source and len(source) > 1:
            yield f"data.source = {list(source)}: `{word}` must stand alone"
    if "" in source:
        yield f"data.source = {list(source)}: an empty name is no dump; the working directory is `.`"
    if abs(sum(fractions.values()) - 1) > 1e-6:
        terms = " + ".join(f"{name} {value:g}" for name, value in fractions.items())
        yield f"data.splits must sum to 1, but {terms} = {sum(fractions.values()):g}"
    if source == (EMBEDDED_TEXT,):
        if recipe.sft.loss_on != "all":
            yield "data.source = embedded-text has no answers: sft.loss_on must be all"
        needed: tuple[str, ...] = ("sft", "eval")
    else:
        needed = tuple(name for name in fractions if name in recipe.stages or name == "eval")
    for name in needed:
        if fractions[name] == 0:
            yield f"data.splits.{name} = 0: this recipe has a stage that needs it; allowed: above 0"
