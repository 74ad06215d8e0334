"""The verdict of a run: three plain sentences from its `summary.json`, and the numbers' way onto the page.

A claim needs its interval: where an interval includes 0 (or one half, for a win rate) the sentence says so, and where
none was given it says that too. Gold is told last and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stackllama.report.reading import number

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def show(value: float | None, digits: int | None = 2, *, signed: bool = False) -> str:
    """A number for reading: `digits` decimals, None for a percentage with one; a dash where there is none."""
    if value is None:
        return DASH
    sign = "+" if signed else ""
    text = f"{value * 100:{sign},.1f}%" if digits is None else f"{value:{sign},.{digits}f}"
    # A minus before 0.0 would claim a direction that the digits shown do not carry.
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def span(low: float | None, high: float | None, digits: int | None = 2, *, signed: bool = False) -> str:
    """`low to high`, or nothing where an end is unknown."""
    return "" if low is None or high is None else " to ".join(show(x, digits, signed=signed) for x in (low, high))


def verdict(
    summary: Mapping[str, Any], *, target: float | None, level: str = "95%", method: str = "PPO"
) -> tuple[tuple[str, str], ...]:
    """Three (stage, sentence) in plain English, from the numbers alone: what moved, and what intervals leave open.

    `target`: of the KL controller, in nats; `level`: the intervals' coverage, as text; `method`: what made the policy.
    """
    return (
        ("SFT", _sft_sentence(summary)),
        ("Reward model", _reward_sentence(summary, level)),
        (method, _policy_sentence(summary, level, target)),
    )


def _sft_sentence(summary: Mapping[str, Any]) -> str:
    before, after = (number(summary, "sft", f"perplexity_{when}") for when in ("before", "after"))
    if before is None or after is None or min(before, after) <= 0:
        return "No perplexity was measured before and after supervised fine-tuning in this run."
    what = f"perplexity on held-out answers from {show(before)} to {show(after)}"
    low, high = (number(summary, "sft", f"perplexity_difference_{end}") for end in ("low", "high"))
    if low is not None and high is not None and low <= 0 <= high:
        return f"Fine-tuning moved {what}, but the interval of the change ({span(low, high, signed=True)}) includes 0."
    if after < before:
        return f"Fine-tuning lowered {what}, {show(1 - after / before, None)} less."
    if after > before:
        return f"Fine-tuning did not help: it raised {what}."
    return f"Fine-tuning left perplexity on held-out answers where it was, at {show(before)}."


def _reward_sentence(summary: Mapping[str, Any], level: str) -> str:
    accuracy, low, high = (number(summary, "reward", f"accuracy{end}") for end in ("", "_low", "_high"))
    if accuracy is None:
        return "No reward model was measured in this run."
    questions = number(summary, "reward", "questions")
    known = [f"{level} interval {span(low, high, None)}"] if low is not None and high is not None else []
    known += [f"{show(questions, 0)} questions"] if questions is not None else []
    head = f"It ranks {show(accuracy, None)} of held-out pairs as the community voted"
    head += f" ({', '.join(known)})" if known else ""
    said = [_against(summary, accuracy, name) for name in ("longer", "earlier")]
    if all(text.startswith("beats") for text in said):
        names = [
            f"{name}-wins ({show(number(summary, 'reward', f'{name}_wins'), None)})" for name in ("longer", "earlier")
        ]
        return f"{head} and beats both baselines, {' and '.join(names)}, with the whole interval of each difference."
    return f"{head}; it {' and '.join(text for text in said if text) or 'was not compared with the baselines'}."


def _against(summary: Mapping[str, Any], accuracy: float, name: str) -> str:
    """The reward model beside one baseline: the paired difference's interval decides, not the two numbers."""
    baseline = number(summary, "reward", f"{name}_wins")
    if baseline is None:
        return ""
    low, high = (number(summary, "reward", f"over_{name}_{end}") for end in ("low", "high"))
    who = f"{name}-wins ({show(baseline, None)})"
    if low is not None and low > 0:
        return f"beats {who}"
    if high is not None and high < 0:
        return f"does worse than {who}"
    if accuracy <= baseline:
        return f"does not beat {who}"
    if low is None:
        return f"stands above {who}, with no interval of the difference to confirm it"
    return (
        f"stands above {who}, but the interval of the difference includes 0 (it starts at {show(low * 100, 1)} points)"
    )


def _policy_sentence(summary: Mapping[str, Any], level: str, target: float | None) -> str:
    before, after = (number(summary, "ppo", f"reward_{when}") for when in ("before", "after"))
    if before is None or after is None:
        return "No policy was trained and compared in this run."
    low, high = (number(summary, "ppo", f"reward_difference_{end}") for end in ("low", "high"))
    open_ = low is not None and high is not None and low <= 0 <= high
    verb = "raised" if after > before else "lowered" if after < before else "did not move"
    text = f"It {'moved' if open_ else verb} the training reward from {show(before)} to {show(after)}"
    if span(low, high):
        text += f" (interval of the change {span(low, high, signed=True)}{', which includes 0' if open_ else ''})"
    text += _kl_words(number(summary, "ppo", "kl"), target)
    parts = [text, _win_words(summary, level), _gold_words(summary, rose=after > before), _alarm_words(summary)]
    return "; ".join(part for part in parts if part) + "."


def _alarm_words(summary: Mapping[str, Any]) -> str:
    """That training was ended, or warned of, by what was seen on held-back prompts; whichever stage trained."""
    for stage in ("ppo", "dpo"):
        part = summary.get(stage)
        count = number(summary, stage, "alarms")
        if count and isinstance(part, Mapping):
            ended = isinstance(part.get("stopped_because"), str)
            times = "one evaluation" if count == 1 else f"{show(count, 0)} evaluations"
            return f"{times} on the way raised an alarm{', which ended its training' if ended else ''}"
    return ""


def _kl_words(kl: float | None, target: float | None) -> str:
    if kl is None:
        return ""
    text = f" at a KL of {show(kl)} nats"
    if kl < 0:
        return f"{text}, which is negative: the estimate is off, or sampling was not plain"
    if target is None:
        return f"{text} (no target set)"
    if kl <= target:
        return f"{text}, within its target of {target:g}"
    return f"{text}, above its target of {target:g}" + (
        " by more than half" if kl > 1.5 * target else " by less than half"
    )


def _win_words(summary: Mapping[str, Any], level: str) -> str:
    rate, low, high = (number(summary, "ppo", f"win_rate{end}") for end in ("", "_low", "_high"))
    if rate is None:
        return "no judge compared the answers"
    known = f" ({level} interval {span(low, high, None)})" if span(low, high) else " (no interval)"
    text = f"the judge prefers its answers to SFT's in {show(rate, None)} of questions{known}"
    if low is not None and high is not None and low <= 0.5 <= high:
        return f"{text}, which does not tell them apart"
    if rate < 0.5:
        return f"{text}, fewer than half"
    return text


def _gold_words(summary: Mapping[str, Any], *, rose: bool) -> str:
    before, after, low, high = (number(summary, "gold", key) for key in ("sft", "ppo", "low", "high"))
    if before is None or after is None:
        return ""
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    tail = ", a sign of reward hacking" if rose and after < before else ""
    interval = "no interval"
    if low is not None and high is not None:
        interval = f"interval of the difference {span(low, high, signed=True)}"
        if low <= 0 <= high:
            verb, tail = "went", ""
            interval += ", which includes 0"
    return f"gold, which training never sees, {verb} from {show(before)} to {show(after)} ({interval}){tail}"
