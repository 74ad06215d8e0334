"""`summary.json`: the numbers of a run, one section a stage, with a documented schema.

Every value is None (and left out of the file) until its stage has measured it. `_low` and `_high` are the ends of the
interval whose coverage is `confidence`. The page `docs/summary.md` is written from these models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stackllama.errors import RunError
from stackllama.files import atomic_write_json, read_json

FILE = "summary.json"


def _number(description: str) -> Any:
    """An optional number; `description` says what was measured, and its unit."""
    return Field(None, description=description)


def _text(description: str) -> Any:
    """An optional text; `description` says what it tells."""
    return Field(None, description=description)


class Part(BaseModel):
    """What all sections share: unknown keys are errors, and so are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataNumbers(Part):
    """What the dump gave."""

    questions: int | None = _number("Questions kept, over all splits.")
    answers: int | None = _number("Their answers.")
    pairs: int | None = _number("Pairs of a better and a worse answer.")
    documents: int | None = _number("Plain documents, where the source has no questions.")


class SFTNumbers(Part):
    """Supervised fine-tuning, on held-out answers."""

    perplexity_before: float | None = _number("Perplexity per answer token of the base model.")
    perplexity_before_low: float | None = _number("Lower end.")
    perplexity_before_high: float | None = _number("Upper end.")
    perplexity_after: float | None = _number("Perplexity per answer token after SFT (adapter merged and rounded).")
    perplexity_after_low: float | None = _number("Lower end.")
    perplexity_after_high: float | None = _number("Upper end.")
    perplexity_difference_low: float | None = _number("Lower end of after - before, paired by question.")
    perplexity_difference_high: float | None = _number("Upper end of after - before.")
    perplexity_unmerged: float | None = _number("Perplexity with the adapter live: what merging and rounding cost.")
    tokens_per_second: float | None = _number("Tokens trained on, per second of the stage's steps.")
    steps: int | None = _number("Optimizer steps.")


class RankingNumbers(Part):
    """A reward model on held-out questions: the mean over questions of the mean over pairs."""

    accuracy: float | None = _number("Share of pairs ranked as the community did, 0 to 1.")
    accuracy_low: float | None = _number("Lower end.")
    accuracy_high: float | None = _number("Upper end.")
    longer_wins: float | None = _number("Accuracy of preferring the longer answer, on the same pairs.")
    longer_wins_low: float | None = _number("Lower end.")
    longer_wins_high: float | None = _number("Upper end.")
    earlier_wins: float | None = _number("Accuracy of preferring the earlier answer, on the same pairs.")
    earlier_wins_low: float | None = _number("Lower end.")
    earlier_wins_high: float | None = _number("Upper end.")
    over_longer_low: float | None = _number("Lower end of accuracy - longer_wins, paired by question.")
    over_longer_high: float | None = _number("Upper end of accuracy - longer_wins.")
    over_earlier_low: float | None = _number("Lower end of accuracy - earlier_wins, paired by question.")
    over_earlier_high: float | None = _number("Upper end of accuracy - earlier_wins.")
    questions: int | None = _number("Questions behind these numbers.")
    pairs: int | None = _number("Pairs behind these numbers.")
    pairs_per_second: float | None = _number("Pairs trained on, per second of the stage's steps.")
    steps: int | None = _number("Optimizer steps.")


class WatchedNumbers(Part):
    """What came of watching a policy's training."""

    alarms: int | None = _number("Evaluations during training that raised an alarm (see the metrics glossary).")
    stopped_because: str | None = _text(
        "Why training ended before its last batch: an alarm, or a KL that reached its target."
    )
    chosen_step: int | None = _number("Optimizer step whose weights were left.")
    chosen_because: str | None = _text("Why these weights.")


class PPONumbers(WatchedNumbers):
    """The policy (whatever made it) against the SFT model, on the same held-out prompts; and what PPO notes."""

    prompts: int | None = _number("Held-out questions answered.")
    reward_before: float | None = _number("Mean score of the SFT model's answers, by the training reward model.")
    reward_after: float | None = _number("Mean score of the policy's answers, by the training reward model.")
    reward_difference_low: float | None = _number("Lower end of after - before, paired by question.")
    reward_difference_high: float | None = _number("Upper end of after - before.")
    judge_before: float | None = _number("Mean score of the SFT model's answers, by the judge.")
    judge_after: float | None = _number("Mean score of the policy's answers, by the judge.")
    judge_difference_low: float | None = _number("Lower end of after - before.")
    judge_difference_high: float | None = _number("Upper end of after - before.")
    kl: float | None = _number("KL from the SFT model: sum over an answer's tokens, mean over answers, in nats.")
    kl_low: float | None = _number("Lower end.")
    kl_high: float | None = _number("Upper end.")
    win_rate: float | None = _number("Share of questions where the judge prefers the policy (ties count half).")
    win_rate_low: float | None = _number("Lower end.")
    win_rate_high: float | None = _number("Upper end.")
    win_rate_length_controlled: float | None = _number("win_rate as it would be at equal lengths (see the glossary).")
    win_rate_length_controlled_low: float | None = _number("Lower end.")
    win_rate_length_controlled_high: float | None = _number("Upper end.")
    win_rate_training_reward: float | None = _number("The same by the training reward model, which PPO follows.")
    win_rate_training_reward_low: float | None = _number("Lower end.")
    win_rate_training_reward_high: float | None = _number("Upper end.")
    length_before: float | None = _number("Mean length of the SFT model's answers, in tokens.")
    length_after: float | None = _number("Mean length of the policy's answers, in tokens.")
    length_difference_low: float | None = _number("Lower end of after - before.")
    length_difference_high: float | None = _number("Upper end of after - before.")
    eos_rate_before: float | None = _number("Share of the SFT model's answers that end by themselves.")
    eos_rate_after: float | None = _number("Share of the policy's answers that end by themselves.")
    repetition_before: float | None = _number("Repetition in the SFT model's answers (see the metrics glossary).")
    repetition_after: float | None = _number("Repetition in the policy's answers.")
    human_perplexity_before: float | None = _number("Perplexity of held-out human answers under the SFT model.")
    human_perplexity_after: float | None = _number("The same under the policy: how much it has forgotten.")
    human_perplexity_difference_low: float | None = _number("Lower end of after - before.")
    human_perplexity_difference_high: float | None = _number("Upper end of after - before.")
    episodes_per_second: float | None = _number("Responses sampled and learned from, per second of the stage's steps.")
    steps: int | None = _number("Batches sampled and learned from.")


class DPONumbers(WatchedNumbers):
    """Direct preference optimization, where it makes the policy. How the policy then does stands under `ppo`."""

    pairs_per_second: float | None = _number("Pairs trained on, per second of the stage's steps.")
    steps: int | None = _number("Optimizer steps.")


class GoldNumbers(Part):
    """Mean gold score (0 to 1) of sampled answers, where the community has one; for reports only."""

    sft: float | None = _number("Of the SFT model.")
    ppo: float | None = _number("Of the policy, whatever made it.")
    difference: float | None = _number("ppo - sft, paired by question.")
    low: float | None = _number("Lower end of the difference.")
    high: float | None = _number("Upper end of the difference.")


class BestOfNumbers(Part):
    """Best-of-n: of `n` answers of the SFT model the one that the training reward model scores highest, on the same
    held-out prompts, against the SFT model's own answer.
    """

    n: int | None = _number("Answers that each one was chosen from.")
    kl_bound: float | None = _number("Most that the KL from the SFT model can be: log n - (n - 1) / n, in nats.")
    reward: float | None = _number("Mean score, by the training reward model.")
    reward_difference_low: float | None = _number("Lower end of best-of-n - SFT, paired by question.")
    reward_difference_high: float | None = _number("Upper end of best-of-n - SFT.")
    judge: float | None = _number("Mean score, by the judge.")
    judge_difference_low: float | None = _number("Lower end of best-of-n - SFT.")
    judge_difference_high: float | None = _number("Upper end of best-of-n - SFT.")
    win_rate: float | None = _number("Share of questions where the judge prefers best-of-n (ties count half).")
    win_rate_low: float | None = _number("Lower end.")
    win_rate_high: float | None = _number("Upper end.")
    win_rate_length_controlled: float | None = _number("win_rate as it would be at equal lengths (see the glossary).")
    win_rate_length_controlled_low: float | None = _number("Lower end.")
    win_rate_length_controlled_high: float | None = _number("Upper end.")
    win_rate_training_reward: float | None = _number("The same by the training reward model, which chose.")
    win_rate_training_reward_low: float | None = _number("Lower end.")
    win_rate_training_reward_high: float | None = _number("Upper end.")
    length: float | None = _number("Mean length, in tokens.")
    length_difference_low: float | None = _number("Lower end of best-of-n - SFT.")
    length_difference_high: float | None = _number("Upper end of best-of-n - SFT.")
    eos_rate: float | None = _number("Share of answers that end by themselves.")
    repetition: float | None = _number("Repetition (see the metrics glossary).")
    distinct_1: float | None = _number("Distinct tokens (see the metrics glossary).")
    distinct_2: float | None = _number("Distinct token pairs.")
    distinct_3: float | None = _number("Distinct runs of 3 tokens.")
    gold: float | None = _number("Mean gold score, where the community has one; for reports only.")
    gold_difference: float | None = _number("best-of-n - SFT, paired by question.")
    gold_low: float | None = _number("Lower end of the difference.")
    gold_high: float | None = _number("Upper end of the difference.")


class Seconds(Part):
    """Wall-clock time of each stage; `total` is their sum."""

    data: float | None = _number("Reading the dump, making pairs and splits.")
    sft: float | None = _number("SFT, with its perplexities.")
    reward: float | None = _number("The reward model.")
    judge: float | None = _number("The judge.")
    ppo: float | None = _number("PPO.")
    dpo: float | None = _number("DPO.")
    evaluate: float | None = _number("Evaluation.")
    total: float | None = _number("All of them.")


_TRAINING = ("episodes_per_second", "steps", "alarms", "stopped_because", "chosen_step", "chosen_because")
ADDED_BY: Mapping[str, str] = {
    **{stage: stage for stage in ("data", "sft", "reward", "judge", "dpo")},
    **dict.fromkeys(("ppo", "gold", "best_of"), "evaluate"),
    **{f"ppo.{key}": "ppo" for key in _TRAINING},
    **{f"seconds.{stage}": stage for stage in ("data", "sft", "reward", "judge", "ppo", "dpo", "evaluate")},
}
"""Section, or SECTION.KEY where stages share a section -> the stage that adds it."""


class Summary(Part):
    """The whole file."""

    name: str | None = Field(None, description="The run's name.")
    confidence: float | None = _number("Coverage of every interval, as a fraction.")
    data: DataNumbers = DataNumbers()
    sft: SFTNumbers = SFTNumbers()
    reward: RankingNumbers = RankingNumbers()
    judge: RankingNumbers = RankingNumbers()
    ppo: PPONumbers = PPONumbers()
    dpo: DPONumbers = DPONumbers()
    gold: GoldNumbers = GoldNumbers()
    best_of: BestOfNumbers = BestOfNumbers()
    seconds: Seconds = Seconds()


def read_summary(folder: Path) -> Summary:
    """The summary in a run's folder, an empty one where there is none yet. Errors: RunError for a broken file."""
    path = folder / FILE
    return _checked(read_json(path), path) if path.exists() else Summary()


def merge_summary(folder: Path, patch: Mapping[str, Any]) -> Summary:
    """Put a stage's numbers into the summary of a run, keep the others, and add up `seconds.total`.

    `patch` is nested like the file: `{"sft": {"perplexity_after": 12.3}, "seconds": {"sft": 40.1}}`; None removes.
    Errors: RunError for a key that the schema does not have, or a value that is not finite.
    """
    path = folder / FILE
    merged = read_summary(folder).model_dump()
    for key, value in patch.items():
        merged[key] = {**merged[key], **value} if isinstance(value, Mapping) and key in merged else value
    stages = [v for k, v in merged["seconds"].items() if k != "total" and v is not None]
    merged["seconds"]["total"] = sum(stages) if stages else None
    summary = _checked(merged, path)
    filled = summary.model_dump(exclude_none=True)
    atomic_write_json(path, {key: value for key, value in filled.items() if value != {}})
    return summary


def numbers_of(summary: Summary, stages: Collection[str]) -> dict[str, Any]:
    """What these stages have added to a summary, as a patch for `merge_summary`."""
    values = summary.model_dump(exclude_none=True)
    patch: dict[str, Any] = {"confidence": values["confidence"]} if "confidence" in values else {}
    for section, numbers in values.items():
        if isinstance(numbers, dict):
            added = {key: ADDED_BY.get(f"{section}.{key}", ADDED_BY.get(section)) for key in numbers}
            patch[section] = {key: value for key, value in numbers.items() if added[key] in stages}
    return patch


def summary_reference() -> str:
    """The page docs/summary.md, in Markdown."""
    lines = ["# summary.json\n", (Summary.__doc__ or "") + " " + _INTRODUCTION]
    for name, field in Summary.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Part):
            lines += [f"\n## `{name}`\n", f"{kind.__doc__}\n", "| key | meaning |", "| --- | --- |"]
            lines += [f"| `{name}.{key}` | {inner.description} |" for key, inner in kind.model_fields.items()]
        else:
            lines.append(f"- `{name}`: {field.description}")
    return "\n".join(lines) + "\n"


_INTRODUCTION = """It stands in the run's folder, and each stage adds its section when it ends. A number that was
not measured is left out. Accuracies, win rates and their baselines are means over questions of the mean over their
pairs or answers; `_low` and `_high` are the ends of bootstrap intervals over question clusters; a comparison is an
interval of the paired difference. This page is written by `stackllama recipe reference --summary`; a test keeps it and
the code the same.
"""


def _checked(values: Any, path: Path) -> Summary:
    try:
        return Summary.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{path}: {key} = {first['input']!r} does not fit ({first['msg']}); docs/summary.md lists the keys"
        ) from error
