"""The verdict: each sentence claims what the numbers carry, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from stackllama.report.verdict import show, span, verdict

SUMMARY: dict[str, Any] = {
    "sft": {"perplexity_before": 9.81, "perplexity_after": 4.02, "tokens_per_second": 21840.0},
    "reward": {
        "accuracy": 0.742,
        "accuracy_low": 0.718,
        "accuracy_high": 0.765,
        "longer_wins": 0.586,
        "earlier_wins": 0.648,
        "over_longer_low": 0.121,
        "over_longer_high": 0.188,
        "over_earlier_low": 0.062,
        "over_earlier_high": 0.127,
        "questions": 812,
    },
    "ppo": {
        "reward_before": -0.41,
        "reward_after": 2.17,
        "kl": 3.42,
        "win_rate": 0.71,
        "win_rate_low": 0.66,
        "win_rate_high": 0.76,
        "win_rate_training_reward": 0.83,
    },
    "gold": {"sft": 0.30, "ppo": 0.73, "difference": 0.43, "low": 0.39, "high": 0.47},
}


def sentences(**changes: dict[str, Any]) -> list[str]:
    summary = {**SUMMARY, **{stage: {**SUMMARY[stage], **change} for stage, change in changes.items()}}
    return [sentence for _, sentence in verdict(summary, target=4.0)]


def test_good_run_in_three_sentences() -> None:
    sft, reward, ppo = sentences()
    assert sft == "Fine-tuning lowered perplexity on held-out answers from 9.81 to 4.02, 59.0% less."
    assert reward == (
        "It ranks 74.2% of held-out pairs as the community voted (95% interval 71.8% to 76.5%, 812 questions) "
        "and beats both baselines, longer-wins (58.6%) and earlier-wins (64.8%), "
        "with the whole interval of each difference."
    )
    assert ppo == (
        "It raised the training reward from \N{MINUS SIGN}0.41 to 2.17 at a KL of 3.42 nats, within its target of 4; "
        "the judge prefers its answers to SFT's in 71.0% of questions (95% interval 66.0% to 76.0%); "
        "gold, which training never sees, rose from 0.30 to 0.73 (interval of the difference +0.39 to +0.47)."
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sft": {"perplexity_after": 10.5}}, "did not help: it raised perplexity"),
        ({"sft": {"perplexity_after": 9.81}}, "left perplexity on held-out answers where it was"),
        (
            {"sft": {"perplexity_difference_low": -6.0, "perplexity_difference_high": 0.4}},
            "(\N{MINUS SIGN}6.00 to +0.40) includes 0",
        ),
        (
            {"reward": {"over_earlier_low": -0.004}},
            "beats longer-wins (58.6%) and stands above earlier-wins (64.8%), but",
        ),
        ({"reward": {"over_earlier_low": -0.004}}, "includes 0 (it starts at \N{MINUS SIGN}0.4 points)"),
        ({"reward": {"accuracy": 0.6, "over_earlier_low": -0.1}}, "does not beat earlier-wins (64.8%)"),
        (
            {"reward": {"accuracy": 0.6, "over_earlier_low": -0.1, "over_earlier_high": -0.01}},
            "does worse than earlier-wins",
        ),
        (
            {"reward": {"over_longer_low": None}},
            "longer-wins (58.6%), with no interval of the difference to confirm it",
        ),
        (
            {"ppo": {"reward_after": -0.9}},
            "It lowered the training reward from \N{MINUS SIGN}0.41 to \N{MINUS SIGN}0.90",
        ),
        ({"ppo": {"reward_difference_low": -0.1, "reward_difference_high": 0.3}}, "It moved the training reward"),
        ({"ppo": {"kl": 5.0}}, "above its target of 4 by less than half"),
        ({"ppo": {"kl": 6.5}}, "above its target of 4 by more than half"),
        ({"ppo": {"kl": -0.5}}, "negative: the estimate is off"),
        ({"ppo": {"win_rate_low": 0.48}}, "which does not tell them apart"),
        (
            {"ppo": {"win_rate_high": 0.45, "win_rate": 0.4, "win_rate_low": 0.35}},
            "prefers its answers to SFT's in 40.0%",
        ),
        (
            {"gold": {"low": -0.02}},
            "gold, which training never sees, went from 0.30 to 0.73 (interval of the difference \N{MINUS SIGN}0.02",
        ),
        ({"gold": {"ppo": 0.2, "low": -0.14, "high": -0.06}}, "fell from 0.30 to 0.20"),
        ({"gold": {"ppo": 0.2, "low": -0.14, "high": -0.06}}, "a sign of reward hacking"),
        (
            {"ppo": {"alarms": 1, "stopped_because": "answers went from 17 to 47 tokens"}},
            "; one evaluation on the way raised an alarm, which ended its training.",
        ),
        ({"ppo": {"alarms": 2, "stopped_because": None}}, "; 2 evaluations on the way raised an alarm."),
    ],
)
def test_verdict_is_honest(changes: dict[str, dict[str, Any]], said: str) -> None:
    assert said in " ".join(sentences(**changes))


def test_verdict_says_both_baselines_only_when_both_are_beaten() -> None:
    for name in ("longer", "earlier"):
        assert "both" not in " ".join(sentences(reward={f"over_{name}_low": -0.01}))
    assert "hacking" not in " ".join(sentences(gold={"ppo": 0.2, "low": -0.3, "high": 0.1}))


def test_numbers_read_well() -> None:
    assert [show(-0.001), show(-1.5), show(1234.5, 0), show(0.4567, None), show(None)] == [
        "0.00",
        "\N{MINUS SIGN}1.50",
        "1,234",
        "45.7%",
        "\N{EN DASH}",
    ]
    assert show(0.25, signed=True) == "+0.25"
    assert span(0.1, 0.2, None) == "10.0% to 20.0%"
    assert span(None, 0.2) == ""
