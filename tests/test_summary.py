from __future__ import annotations

import json
from pathlib import Path

import pytest

from stackllama.errors import RunError
from stackllama.summary import Part, Summary, merge_summary, read_summary, summary_reference

ROOT = Path(__file__).resolve().parent.parent

PROMISED = {
    "data": "questions answers pairs",
    "sft": "perplexity_before perplexity_after tokens_per_second",
    "reward": "accuracy accuracy_low accuracy_high longer_wins earlier_wins over_longer_low over_earlier_low questions",
    "judge": "accuracy",
    "ppo": "reward_before reward_after kl win_rate win_rate_low win_rate_high win_rate_training_reward",
    "gold": "sft ppo difference low high",
    "seconds": "data sft reward ppo evaluate total",
}


def test_what_is_promised_is_in_the_schema_and_in_its_page() -> None:
    page = (ROOT / "docs" / "summary.md").read_text("utf-8")
    for section, name in ((section, name) for section, names in PROMISED.items() for name in names.split()):
        kind = Summary.model_fields[section].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Part)
        assert name in kind.model_fields
        assert f"| `{section}.{name}` |" in page


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "summary.md").read_text("utf-8")
    assert page == summary_reference(), "write it again: stackllama recipe reference --summary > docs/summary.md"


def test_stages_add_their_numbers_and_keep_the_others(tmp_path: Path) -> None:
    merge_summary(tmp_path, {"name": "x", "sft": {"perplexity_before": 9.0}, "seconds": {"sft": 2.5}})
    merge_summary(tmp_path, {"sft": {"perplexity_after": 4.0}, "seconds": {"ppo": 1.5}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "name": "x",
        "sft": {"perplexity_before": 9.0, "perplexity_after": 4.0},
        "seconds": {"sft": 2.5, "ppo": 1.5, "total": 4.0},
    }
    merge_summary(tmp_path, {"seconds": {"ppo": 2.0}, "sft": {"perplexity_before": None}})
    summary = read_summary(tmp_path)
    assert (summary.seconds.total, summary.sft.perplexity_before, summary.sft.perplexity_after) == (4.5, None, 4.0)


@pytest.mark.parametrize(
    ("patch", "key"),
    [
        ({"sft": {"perplexity": 3.0}}, "sft.perplexity"),
        ({"sfy": {"perplexity_after": 3.0}}, "sfy"),
        ({"ppo": {"kl": float("nan")}}, "ppo.kl"),
        ({"ppo": 3}, "ppo"),
    ],
)
def test_what_the_schema_does_not_have_is_refused_and_nothing_is_written(
    tmp_path: Path, patch: dict[str, object], key: str
) -> None:
    with pytest.raises(RunError, match=f"{key} = "):
        merge_summary(tmp_path, patch)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(RunError, match=r"summary\.json"):
        read_summary(tmp_path)
