"""The recipe: one YAML file that states every stage of a run, as pydantic models.

Every field has a default (a recipe states only what differs), a unit and a sentence; unknown keys are errors; the
models are frozen. Checks that compare fields stand together in `contradictions`. Reading files, overrides and error
messages: `recipe_load.py`. Where a default comes from the original StackLLaMA recipe (April 2023), its field says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stackllama.recipe_training import DPO, PPO, Optimization, Section, Watch, dpo_contradictions, ppo_contradictions

EMBEDDED = "embedded"
EMBEDDED_TEXT = "embedded-text"
PUBLIC_DUMP = "https://archive.org/download/stackexchange"
SIZE = re.compile(r"\d+(\.\d+)?[mMbB]")

Fraction = Annotated[float, Field(ge=0, le=1)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _off(value: object) -> object:
    """YAML reads the bare word `off` as false."""
    return "off" if value is False else value


_OFF = BeforeValidator(_off)


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
    side_by_side: int = Field(24, ge=0, le=1000, description="Questions whose answers the report shows.")


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
    watch: Watch = Field(default_factory=Watch, description="What is looked at while the policy is trained.")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="What is measured after training.")
    guard: Guard = Field(default_factory=Guard, description="Faults of single steps, in every trained stage.")
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",),
        description="Where metrics go beside `metrics.jsonl`: event files in the run's folder `tensorboard`, Weights & "
        "Biases, trackio (the last two need `stackllama[trackers]`); `[]`: nowhere.",
    )
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
        yield from ppo_contradictions(recipe.ppo)
        yield from _sampler_contradictions(recipe)
        yield from _bound_contradictions(recipe)
    if "dpo" in recipe.stages:
        yield from dpo_contradictions(recipe.dpo)
    if "evaluate" in recipe.stages and recipe.evaluate.best_of == 1:
        yield "evaluate.best_of = 1 has nothing to choose from; make it at least 2, or 0 for none"
    yield from _guard_contradictions(recipe.guard)
    yield from _base_contradictions(recipe)


def _bound_contradictions(recipe: Recipe) -> Iterator[str]:
    bound, kl = recipe.watch.kl_bound, recipe.ppo.kl
    if recipe.watch.every is not None and kl.controller == "adaptive" and bound < kl.target:
        yield (
            f"watch.kl_bound = {bound:g} is below ppo.kl.target = {kl.target:g}, which the controller steers to: no "
            "weights would be kept; raise the bound, or lower the target"
        )


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
        if recipe.policy == "dpo" and recipe.watch.every is not None and fractions["ppo"] == 0:
            yield "data.splits.ppo = 0: training is watched on questions of it; make it more, or watch.every null"
    for name in needed:
        if fractions[name] == 0:
            yield f"data.splits.{name} = 0: this recipe has a stage that needs it; allowed: above 0"
