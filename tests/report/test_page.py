"""The report page: what it says, what it survives, and that no text of a run can become markup."""

from __future__ import annotations

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from stackllama.errors import RunError
from stackllama.recipe import Recipe
from stackllama.recipe_load import to_yaml
from stackllama.report.page import flatten, write_report
from stackllama.report.reading import STAGES, read_run

SUMMARY: dict[str, Any] = {
    "data": {"questions": 6000, "answers": 21480, "pairs": 18211},
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
    "judge": {"accuracy": 0.729},
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
    "seconds": {"data": 11.2, "sft": 41.0, "reward": 84.6, "ppo": 107.3, "evaluate": 14.9, "total": 259.0},
}
RECIPE = {
    "name": "quickstart",
    "base": {"model": "embedded"},
    "seed": 1,
    "ppo": {"kl": {"target": 4.0}, "episodes": 64},
}
ENVIRONMENT = {
    "python": "3.11.9",
    "packages": {"stackllama": "0.1.0", "torch": "2.13.0"},
    "threads": 2,
    "processor": "An x86 processor",
    "features": ["avx512f", "avx512_bf16"],
}
LINEAGE: dict[str, Any] = {
    "format": 1,
    "recipe": "9a0b" * 16,
    "stages": {
        "data": {"inputs": {"source": "5f1c" * 16}, "outputs": {"shards": "77de" * 16}, "environment": ENVIRONMENT},
        "sft": {"inputs": {"data": "77de" * 16}, "outputs": {"final": "c3a1" * 16}, "environment": ENVIRONMENT},
    },
}
DATA = {
    "rows": 27480,
    "orphans": 0,
    "splits": {
        name: {"questions": count, "answers": 3 * count, "pairs": 3 * count}
        for name, count in {"sft": 2400, "reward": 1500, "judge": 700, "ppo": 900, "eval": 500}.items()
    },
    "dropped": {"tied": 1203, "over_max_pairs": 310, "single_answer": 97},
}
HOSTILE = """</pre><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} &lt;b&gt; \x1b[31m \ud83d"""


def log_lines(stage: str, steps: int) -> list[dict[str, float]]:
    """A stage's metrics as such a run would write them: noisy, saturating curves."""
    noise = random.Random(stage)
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-3 * step / steps)
        jitter = noise.gauss(0, 1)
        row: dict[str, float] = {
            "step": step,
            "gradient_norm": 1 + 0.2 * abs(jitter),
            "learning_rate": 1e-3 * (1 - done),
        }
        if stage == "sft":
            row |= {
                "loss": 2.4 - done + 0.05 * jitter,
                "tokens_per_second": 21800 + 300 * jitter,
                "tokens": 8192 * step,
            }
            if step % (steps // 6) == 0:
                rows.append({"step": step, "perplexity": 9.8 - 5.8 * done})
        elif stage == "ppo":
            row |= {
                "reward": -0.4 + 2.6 * done + 0.15 * jitter,
                "reward_std": 1.2 - 0.4 * done,
                "kl": 3.4 * done + 0.1 * jitter,
            }
            row |= {
                "kl_coefficient": 0.2 - 0.05 * done,
                "length": 16 + 12 * done + jitter,
                "eos_rate": 0.93 + 0.05 * done,
            }
            row |= {"policy_loss": -0.01 * done, "value_loss": 0.5 - 0.4 * done, "entropy": 1.4 - 0.6 * done}
            row |= {
                "ratio_mean": 1 + 0.004 * jitter,
                "ratio_max": 2.2 + 0.5 * abs(jitter),
                "clip_fraction": 0.06 + 0.01 * abs(jitter),
            }
            row |= {
                "approximate_kl": 0.01,
                "explained_variance": 0.8 * done,
                "sampler_difference": 1e-6,
                "episodes_per_second": 48.0,
            }
        else:
            row |= {"loss": 0.7 - 0.18 * done + 0.03 * jitter, "accuracy": 0.5 + 0.24 * done + 0.03 * jitter}
            row |= {"margin": 1.3 * done, "questions": 16 * step}
            row |= {"better_reward": -0.2 * done, "worse_reward": -1.5 * done} if stage == "dpo" else {}
        rows.append(row)
    return rows


def sample(index: int) -> dict[str, Any]:
    question = (
        f"How deep is the harbour of Port Elvan?\n\nMy chart (number {index}) leaves it out, and I sail on Monday."
    )
    short = "It is 12 metres deep."
    long = (
        "The harbour of Port Elvan is 14 metres deep at low water.\n\nHope this helps! Ask again if the chart differs."
    )
    return {
        "question": question,
        "url": f"https://embedded.example/questions/{index}",
        "answers": [
            {"role": "sft", "text": short, "reward": -0.52, "judge": -0.31, "gold": 0.2, "stopped": "eos"},
            {"role": "ppo", "text": long, "reward": 2.31, "judge": 1.64, "gold": 0.9, "stopped": "length"},
        ],
    }


def write_run(folder: Path) -> Path:
    """A whole run folder, as the stages leave it."""
    for name in (*STAGES, "data", "evaluate"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    steps = {"sft": 240, "reward": 180, "judge": 90, "ppo": 80, "dpo": 60}
    for stage in STAGES:
        lines = [json.dumps(row) for row in log_lines(stage, steps[stage])]
        (folder / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    common = {"repetition": 0.021, "distinct_2": 0.61}
    policy = {
        "sft": {"reward": -0.41, "judge": -0.28, "length": 16.2, "eos_rate": 0.95, "gold": 0.30, "kl": 0.0, **common},
        "ppo": {"reward": 2.17, "judge": 1.32, "length": 28.4, "eos_rate": 0.98, "gold": 0.73, "kl": 3.42, **common},
    }
    files = {"summary.json": SUMMARY, "lineage.json": LINEAGE, "data/report.json": DATA, "evaluate/policy.json": policy}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    (folder / "evaluate" / "samples.json").write_text(json.dumps([sample(i) for i in range(10)]), "utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), "utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "quickstart")


@pytest.fixture
def bare(run: Path) -> Path:
    """The same without curves, which take most of the time."""
    for stage in STAGES:
        (run / stage / "metrics.jsonl").unlink()
    return run


class Seen(HTMLParser):
    """Tags, ids, references and the text of every <pre> of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "pre":
            self.texts[-1] += data


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, **changes}), "utf-8")


def words(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_best_of_n_has_its_column_its_wins_and_its_samples(tmp_path: Path) -> None:
    best = {"n": 16, "kl_bound": 1.8351, "reward": 1.9, "judge": 0.8, "gold": 0.6, "gold_low": 0.2, "gold_high": 0.4}
    best |= {"win_rate": 0.66, "win_rate_low": 0.6, "win_rate_high": 0.72}
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {"best_of": best}), "utf-8")
    (tmp_path / "evaluate").mkdir()
    answers = [{"role": role, "text": f"said by {role}"} for role in ("sft", "ppo", "best_of")]
    sample = [{"question": "What?", "url": "", "answers": answers}]
    (tmp_path / "evaluate" / "samples.json").write_text(json.dumps(sample), "utf-8")
    page = write_report(tmp_path).read_text("utf-8")
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))
    assert "measure SFT PPO difference best of 16 difference" in text
    assert "KL from the SFT model, nats – 3.42 – at most 1.84 –" in text
    assert "Gold (for reports only) 0.300 0.730 +0.430 +0.390 to +0.470 0.600 +0.300 +0.200 to +0.400" in text
    assert "Its KL is at most 1.84 nats" in text
    assert "Best of 16, judge 66.0% [60.0, 72.0]" in page
    assert [page.index(f"said by {role}") for role in ("sft", "ppo", "best_of")]
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY), "utf-8")
    assert "best of" not in write_report(tmp_path).read_text("utf-8").lower()


def test_whole_run_is_told_in_order_verdict_first(run: Path) -> None:
    page = write_report(run).read_text("utf-8")
    headings = [
        'class="verdict"',
        *(f'id="{name}"' for name in ("data", "sft", "reward", "policy", "evaluation", "samples")),
    ]
    headings += [f'id="{name}"' for name in ("settings", "lineage", "seconds")]
    places = [page.index(heading) for heading in headings]
    assert places == sorted(places)
    text = words(page)
    for number in ("18,211", "1,203", "21,840", "74.2%", "58.6%", "64.8%", "71.0%", "83.0%", "28.4", "107.3", "2.13.0"):
        assert number in text, number
    assert page.count("<article") == 10
    assert "not in this run" not in text
    assert "has not run" not in text


def test_page_needs_nothing_from_outside_and_runs_nothing(run: Path) -> None:
    path = write_report(run)
    page = path.read_text("utf-8")
    seen = Seen(page)
    assert not {"script", "link", "iframe", "object", "img", "base"} & set(seen.tags)
    assert any(key == "content" and value.startswith("default-src 'none'") for key, value in seen.attributes)
    assert not [key for key, _ in seen.attributes if key.startswith("on") or key == "src"]
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert path.stat().st_size < 2_000_000


def test_ids_are_unique_and_every_reference_has_one(run: Path) -> None:
    page = write_report(run).read_text("utf-8")
    ids = Seen(page).ids
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert references
    assert references <= set(ids)


def test_same_run_gives_same_bytes_and_leaves_no_other_file(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_failure_leaves_the_old_report(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_report(bare).read_bytes()
    files = set(bare.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="full"):
        write_report(bare)
    assert set(bare.iterdir()) == files
    assert (bare / "report.html").read_bytes() == first


def test_hostile_texts_stay_text(bare: Path) -> None:
    hostile = sample(0) | {"question": HOSTILE, "url": "javascript:alert(3)"}
    hostile["answers"] = [{"role": role, "text": HOSTILE + "\n" + "x" * 5000, "reward": 1.0} for role in ("sft", "ppo")]
    (bare / "evaluate" / "samples.json").write_text(json.dumps([hostile]), "utf-8")
    (bare / "recipe.yaml").write_text(yaml.safe_dump({"name": "<script>alert(4)</script>", "base": "<b>"}), "utf-8")
    edit(bare / "data" / "report.json", dropped={"<script>alert(5)</script>": 3})
    edit(bare / "lineage.json", dump="<script>alert(6)</script>")
    seen = Seen(write_report(bare).read_text("utf-8"))
    assert "script" not in seen.tags
    assert "img" not in seen.tags
    assert not [value for key, value in seen.attributes if key == "href" and not value.startswith("#")]
    # What the reader sees is what was written: only the escape and the half character are shown in another form.
    shown = HOSTILE.replace("\x1b", "\N{SYMBOL FOR ESCAPE}").replace("\ud83d", "?")
    assert [text.strip("\n") for text in seen.texts] == [shown, *[shown + "\n" + "x" * 5000] * 2]


def test_endless_answer_is_cut_and_says_so(bare: Path) -> None:
    endless = sample(0) | {"question": "a" * 120_000}
    (bare / "evaluate" / "samples.json").write_text(json.dumps([endless] * 30), "utf-8")
    path = write_report(bare)
    assert path.stat().st_size < 2_000_000
    page = path.read_text("utf-8")
    assert f"{30 - page.count('<article')} more are in evaluate/samples.json" in page
    assert "100,000 more characters are not shown" in page


def test_only_sft_ran(run: Path) -> None:
    for name in ("reward", "judge", "ppo"):
        (run / name / "metrics.jsonl").unlink()
    for name in ("samples", "policy"):
        (run / "evaluate" / f"{name}.json").unlink()
    (run / "summary.json").write_text(json.dumps({"sft": SUMMARY["sft"]}), "utf-8")
    page = write_report(run).read_text("utf-8")
    text = words(page)
    assert "Fine-tuning lowered perplexity" in text
    assert "No reward model was measured in this run." in text
    assert "No policy was trained and compared in this run." in text
    assert "PPO has not run in this run." in text
    assert "No samples are in this run." in text
    assert page.count('class="plot"') == 5


def test_summary_of_a_stage_without_its_log_is_told_without_curves(run: Path) -> None:
    for stage in STAGES:
        (run / stage / "metrics.jsonl").unlink()
    page = write_report(run).read_text("utf-8")
    assert "sft-loss" not in page
    assert "74.2%" in page


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({}, "PPO"),
        ({"policy": "ppo", "ppo": {"advantage": "grpo"}}, "GRPO"),
        ({"ppo": {"advantage": "rloo"}}, "RLOO"),
        ({"policy": "dpo", "dpo": {"loss": "dpo"}}, "DPO"),
        ({"policy": "dpo", "dpo": {"loss": "ipo"}}, "IPO"),
    ],
)
def test_a_reader_sees_the_method_that_made_the_policy(bare: Path, recipe: dict[str, Any], method: str) -> None:
    (bare / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    page = write_report(bare).read_text("utf-8")
    assert f"Evaluation: SFT against {method}</h2>" in page
    assert f"{method}, judge" in page
    assert f"{method} has not run in this run." in page
    if method != "PPO":
        assert not re.search(r"\bPPO\b", page)


def test_a_run_of_dpo_shows_its_curves_and_no_target_of_kl(run: Path) -> None:
    (run / "recipe.yaml").write_text(yaml.safe_dump({"policy": "dpo"}), "utf-8")
    page = write_report(run).read_text("utf-8")
    assert "Implied rewards" in page
    assert "dpo-rewards" in page
    assert "ppo-reward" not in page
    assert "within its target" not in page


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere is not a run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match="run a stage"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["summary.json", "recipe.yaml", "evaluate/samples.json"])
@pytest.mark.parametrize("content", ['{"a": ', '"text"'])
def test_broken_file_is_named(bare: Path, name: str, content: str) -> None:
    (bare / name).write_text(content, "utf-8")
    with pytest.raises(RunError, match=Path(name).name):
        write_report(bare)


def test_unknown_and_odd_values_break_nothing_and_show_nowhere(bare: Path) -> None:
    edit(bare / "evaluate" / "policy.json", sft=None, mystery=4242.5)
    edit(bare / "data" / "report.json", splits=7, dropped=None, mystery=4242.5)
    samples = [{"answers": [{"role": "ppo", "mystery": 4242.5}, 7]}, {}, 3, {"answers": 7, "question": None, "url": 7}]
    (bare / "evaluate" / "samples.json").write_text(json.dumps(samples), "utf-8")
    page = write_report(bare).read_text("utf-8")
    assert "4242" not in words(page)
    assert "4,242" not in words(page)
    assert page.count("<article") == 3


def test_the_baselines_under_each_rule_and_why_there_is_no_pair(bare: Path) -> None:
    known = {"longer_wins": 0.7, "longer_error": 0.01, "earlier_wins": 0.5, "earlier_error": 0.02}
    row = {"rules": "the original rules", "questions": 1234, "pairs": 5678, **known}
    edit(bare / "data" / "report.json", baselines=[row, 7, {"rules": "odd"}], pairs_dropped={"pair: tied score": 4321})
    text = re.sub(r"\s+", " ", words(write_report(bare).read_text("utf-8")))
    assert "the original rules 1,234 5,678 0.700 ± 0.010 0.500 ± 0.020" in text
    assert "pair: tied score 4,321" in text
    assert "odd" not in text


def test_torn_lines_are_told(run: Path) -> None:
    with (run / "ppo" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 81, "rew')
    assert "ppo/metrics.jsonl: 1 unreadable line was skipped." in write_report(run).read_text("utf-8")
    assert len(read_run(run).logs["ppo"]["reward"]) == 80


def test_settings_that_differ(bare: Path) -> None:
    defaults = {"name": "run", "base": {"model": "embedded"}, "seed": 1, "ppo": {"kl": {"target": 6.0}, "episodes": 64}}
    text = words(write_report(bare, defaults=defaults).read_text("utf-8"))
    assert "Settings that differ from the defaults" in text
    settings = text[text.index("Settings that differ") : text.rindex("Lineage")]
    assert "ppo.kl.target" in settings
    assert "4.0" in settings
    assert "6.0" in settings
    assert "ppo.episodes" not in settings
    assert flatten({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}) == [("a.b", '[1, {"c": 2}]'), ("e", "null")]


def test_environment_stands_once_unless_a_stage_ran_under_another(bare: Path) -> None:
    page = write_report(bare).read_text("utf-8")
    assert page.count("2.13.0") == 1
    assert page.count("77de" * 16) == 2
    stages = LINEAGE["stages"]
    other = {**stages["sft"], "environment": {**ENVIRONMENT, "packages": {"stackllama": "0.1.0", "torch": "2.12.1"}}}
    edit(bare / "lineage.json", stages={**stages, "sft": other})
    text = words(write_report(bare).read_text("utf-8"))
    assert "torch (data)" in text
    assert "2.12.1" in text
    assert text.count("0.1.0") == 1


def test_settings_of_a_default_recipe_all_agree(bare: Path) -> None:
    recipe = Recipe.model_validate({"name": "plain", "data": {"source": "embedded"}})
    (bare / "recipe.yaml").write_text(to_yaml(recipe), "utf-8")
    text = words(write_report(bare, defaults=recipe.model_dump(mode="json", by_alias=True)).read_text("utf-8"))
    assert re.search(r"Settings that differ from the defaults\s+None\.", text)


def test_summary_stands_in_for_a_missing_policy_file(bare: Path) -> None:
    (bare / "evaluate" / "policy.json").unlink()
    more = {"length_before": 16.0, "length_after": 20.0, "length_difference_low": 3.1, "length_difference_high": 4.9}
    edit(bare / "summary.json", ppo={**SUMMARY["ppo"], **more})
    text = re.sub(r"\s+", " ", words(write_report(bare).read_text("utf-8")))
    assert "Length, tokens 16.0 20.0 +4.0 +3.1 to +4.9" in text
    assert "Gold (for reports only) 0.300 0.730 +0.430 +0.390 to +0.470" in text


def test_kl_target_line_only_where_there_is_a_target(run: Path) -> None:
    assert "target 4" in words(write_report(run).read_text("utf-8"))
    (run / "recipe.yaml").write_text(yaml.safe_dump({"ppo": {"kl": {"controller": "fixed", "target": 4.0}}}), "utf-8")
    text = words(write_report(run).read_text("utf-8"))
    assert "target 4" not in text
    assert "no target set" in text


def test_long_answers_and_lost_ends_are_remarked(bare: Path) -> None:
    assert "Answers grew from 16 to 28 tokens" in words(write_report(bare).read_text("utf-8"))
    policy = bare / "evaluate" / "policy.json"
    edit(policy, ppo={"length": 17.0, "eos_rate": 0.5, "repetition": 0.3})
    text = words(write_report(bare).read_text("utf-8"))
    assert "Answers grew" not in text
    assert "Fewer answers finish by themselves: 95.0% before, 50.0% after." in text
    assert "repeat themselves more" in text
