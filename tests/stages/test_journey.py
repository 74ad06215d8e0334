"""The whole journey in small, as a user runs it: every stage, every file, killed and gone on with to the same bits."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stackllama.assembly import FINAL, FROZEN, SFT, load_trunk
from stackllama.cli import main
from stackllama.data.store import store
from stackllama.model.load import load_base
from stackllama.model.nf4 import quantize
from stackllama.recipe_load import load_recipe, to_yaml, with_values
from stackllama.run import open_run, stage_outputs
from stackllama.stages import sft
from stackllama.stages.data import run_data
from stackllama.train.metrics import read_log
from tests.data.dumps import answer, question, site
from tests.train.test_trackers import curves

# Every test here starts from the same journey, which one process makes once.
pytestmark = pytest.mark.xdist_group("stages")

RECIPE = """
base: {model: 0.2m, vocabulary: 600}
data: {source: embedded, questions: 400, splits: {sft: 0.3, reward: 0.3, judge: 0.15, ppo: 0.1, eval: 0.15}}
sft: {method: full, learning_rate: 2.0e-3, tokens_per_step: 1024, max_tokens: 256, answers: all, max_steps: 16}
reward: {method: lora, lora: {rank: 4, dropout: 0.1}, questions_per_step: 8, head_questions: 20, max_steps: 12,
  centring: 0.01, length_penalty: 0.1, max_question_tokens: 192, max_answer_tokens: 96}
ppo: {method: METHOD, steps: 3, prompts_per_step: 8, samples_per_prompt: 2, epochs: 2, minibatches: 2,
  max_prompt_tokens: 192, max_new_tokens: 16, learning_rate: 1.0e-3}
watch: {every: 1, prompts: 8}
evaluate: {prompts: 12, best_of: 3, perplexity_answers: 20, resamples: 200, side_by_side: 3}
compute: {device: cpu, threads: 1, checkpoint_steps: 3, log_steps: 1, row_tokens: 512}
"""


def write_recipe(folder: Path, method: str = "full") -> Path:
    path = folder / "small.yaml"
    path.write_text(RECIPE.replace("METHOD", method), encoding="utf-8")
    return path


def stackllama(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stackllama.cli", *words]
    environment = os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def final_weights(run: Path) -> dict[str, str]:
    """Hash of every final tensor file, by its place in the run."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted([*run.glob("*/final/*.safetensors"), *run.glob("*/frozen/*.safetensors")])
    }


def kill_and_go_on(folder: Path, stage: str, *words: str, draw: random.Random) -> None:
    """Kill a stage of the run `small` at a random moment after some steps, and give the same command again."""
    run = folder / "runs" / "small"
    process = stackllama(folder, stage, "small.yaml", *words)
    log = run / stage / "metrics.jsonl"
    wanted = draw.randint(2, 7)
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < wanted):
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / stage / "complete.json").exists()
    finish(stackllama(folder, stage, "small.yaml", *words))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a journey that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    output = finish(stackllama(folder, "run", str(write_recipe(folder))))
    assert "next: stackllama chat runs/small" in output
    return folder / "runs" / "small"


def test_every_stage_leaves_its_numbers_and_the_report(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["data"]["questions"] == 400
    assert summary["sft"]["perplexity_after"] < summary["sft"]["perplexity_before"]
    for role in ("reward", "judge"):
        assert 0 <= summary[role]["accuracy_low"] <= summary[role]["accuracy"] <= summary[role]["accuracy_high"] <= 1
        assert {"longer_wins", "earlier_wins", "over_longer_low", "over_earlier_low"} <= summary[role].keys()
        audit = json.loads((whole / role / "audit.json").read_text())
        assert audit["accuracy"]["mean"] == summary[role]["accuracy"]
        assert [one["accuracy"]["mean"] for one in audit["baselines"]][:2] == [
            summary[role]["longer_wins"],
            summary[role]["earlier_wins"],
        ]
        assert list(audit["reactions"]) == ["cut to half", "without their end", "with Markdown noise"]
        assert all(one["questions"] == summary[role]["questions"] for one in audit["reactions"].values())
    assert {"reward_before", "reward_after", "kl", "win_rate", "win_rate_low", "win_rate_high"} <= summary["ppo"].keys()
    assert {"sft", "ppo", "difference", "low", "high"} == summary["gold"].keys()
    assert summary["best_of"]["n"] == 3
    assert summary["best_of"]["reward"] > summary["ppo"]["reward_before"]
    assert {"gold", "gold_difference", "win_rate_low", "kl_bound"} <= summary["best_of"].keys()
    stages = {"data", "sft", "reward", "judge", "ppo", "evaluate"}
    assert summary["seconds"].keys() == stages | {"total"}
    assert summary["seconds"]["total"] == pytest.approx(sum(summary["seconds"][stage] for stage in stages))
    drift = json.loads((whole / "evaluate" / "drift.json").read_text())
    assert {scorer: list(found) for scorer, found in drift.items()} == {
        scorer: ["people", "sft", "ppo", "best_of"] for scorer in ("reward", "judge")
    }
    assert 2 <= drift["reward"]["people"]["questions"] == drift["judge"]["ppo"]["questions"] <= 12
    assert drift["reward"]["ppo"]["beyond"] is None  # fewer than 20 questions
    assert len(json.loads((whole / "evaluate" / "samples.json").read_text())) == 12
    page = (whole / "report.html").read_text()
    assert page.count("<article") == 3
    assert "Where their scores lie" in page
    findings = json.loads((whole / "reward/audit.json").read_text())["findings"]
    assert all(finding in html.unescape(page) for finding in findings)
    assert set(final_weights(whole)) == {
        "sft/final/model.safetensors",
        "reward/final/role.safetensors",
        "judge/final/role.safetensors",
        "ppo/final/role.safetensors",
    }


def test_a_rival_started_from_the_run_makes_only_what_differs(whole: Path) -> None:
    folder = whole.parent.parent
    words = ("--name", "rival", "--from", "small", "--ppo.clip", "0.1")
    output = finish(stackllama(folder, "run", "small.yaml", *words))
    assert "taken over from runs/small: data, sft, reward, judge" in output
    ours, theirs = final_weights(folder / "runs/rival"), final_weights(whole)
    assert {name for name in theirs if ours[name] != theirs[name]} == {"ppo/final/role.safetensors"}
    numbers, before = (json.loads((run / "summary.json").read_text()) for run in (folder / "runs/rival", whole))
    for section in ("data", "sft", "reward", "judge"):
        assert numbers[section] == before[section]
    assert numbers["ppo"]["reward_before"] == before["ppo"]["reward_before"]
    assert numbers["best_of"] == before["best_of"]
    compared = finish(stackllama(folder, "compare", "small", "rival", "--json"))
    groups = json.loads(compared[: compared.rindex("}") + 1])["groups"]
    assert [row["name"] for row in groups[0]["rows"]] == ["SFT", "best of 3", "small", "rival"]


def test_the_same_command_again_changes_nothing(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/final/*")}
    finish(stackllama(whole.parent.parent, "run", "small.yaml"))
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*/final/*")} == before


def test_killed_at_random_moments_it_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    draw = random.Random(1)
    finish(stackllama(tmp_path, "data", "small.yaml"))
    for stage in ("sft", "reward", "ppo"):
        kill_and_go_on(tmp_path, stage, draw=draw)
    assert final_weights(tmp_path / "runs" / "small") == final_weights(whole)
    assert (tmp_path / "runs/small/reward/audit.json").read_bytes() == (whole / "reward/audit.json").read_bytes()
    for log in ("metrics.jsonl", "watch.jsonl"):
        assert (tmp_path / "runs/small/ppo" / log).read_bytes() == (whole / "ppo" / log).read_bytes()
    ours, theirs = (json.loads((run / "summary.json").read_text())["ppo"] for run in (tmp_path / "runs/small", whole))
    for key in ("steps", "alarms", "chosen_step", "chosen_because"):
        assert ours[key] == theirs[key]


def test_ppo_is_watched_and_leaves_the_judges_best_within_the_bound(whole: Path) -> None:
    lines = read_log(whole / "ppo" / "watch.jsonl")
    assert [line["rounds"] for line in lines] == [0, 1, 2, 3]
    assert {line["prompts"] for line in lines} == {8}
    assert all("gold" in line for line in lines)
    summary = json.loads((whole / "summary.json").read_text())["ppo"]
    assert summary["alarms"] == sum("alarms" in line for line in lines)
    allowed = [line for line in lines[1:] if line["kl"] <= 12.0 and "alarms" not in line]  # twice the target of 6
    best = max(allowed, key=lambda line: float(line["judge"]))
    assert summary["chosen_step"] == best["step"]
    assert "Watched on prompts held back from training" in (whole / "report.html").read_text()
    drawn = curves(whole / "tensorboard" / "ppo-watch")
    assert list(drawn["judge"]) == [line["step"] for line in lines]
    assert list(drawn["judge"].values()) == pytest.approx([line["judge"] for line in lines])


def test_without_watching_ppo_has_all_prompts_and_leaves_its_last_weights(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parent.parent, tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / "small"
    for stage in ("ppo", "evaluate"):
        shutil.rmtree(run / stage)
    for path in (run / "summary.json", run / "report.html"):
        path.unlink()
    finish(stackllama(tmp_path / "copy", "ppo", "small.yaml", "--watch.every", "null"))
    assert not (run / "ppo" / "watch.jsonl").exists()
    summary = json.loads((run / "summary.json").read_text())["ppo"]
    assert summary["steps"] == 3
    assert "chosen_step" not in summary
    assert final_weights(run)["ppo/final/role.safetensors"] != final_weights(whole)["ppo/final/role.safetensors"]


def test_killed_behind_its_last_step_a_stage_states_no_rate(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.parent.parent, tmp_path / "copy")
    run = tmp_path / "copy" / "runs" / "small"
    assert json.loads((run / "summary.json").read_text())["sft"]["tokens_per_second"] > 0
    (run / "sft" / "complete.json").unlink()
    shutil.rmtree(run / "sft" / "final")
    finish(stackllama(tmp_path / "copy", "sft", "small.yaml"))
    assert "tokens_per_second" not in json.loads((run / "summary.json").read_text())["sft"]
    assert final_weights(run) == final_weights(whole)


def test_chat_and_score_speak_with_the_run(whole: Path) -> None:
    folder = whole.parent.parent
    for stage in ("ppo", "sft"):
        words = ("chat", "runs/small", "--stage", stage, "--question", "What soil does a velda need?")
        assert finish(stackllama(folder, *words)).strip()
    output = finish(
        stackllama(folder, "score", "runs/small", "--question", "Soil?", "--answer", "Use sand.", "--answer", "No.")
    )
    rewards = [float(line.split("\t")[0]) for line in output.splitlines() if "\t" in line]
    assert len(rewards) == 2
    assert rewards[0] != rewards[1]


def test_a_stage_without_its_predecessor_says_what_to_type(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    process = stackllama(tmp_path, "ppo", "small.yaml")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "stackllama data" in output


def test_ppo_by_adapter_on_the_same_trunk(whole: Path) -> None:
    folder = whole.parent.parent
    write_recipe(folder, "lora")
    finish(stackllama(folder, "run", "small.yaml", "--name", "adapter"))
    assert json.loads((folder / "runs/adapter/summary.json").read_text())["ppo"]["kl"] is not None


def only_ppo_is_left(whole: Path, folder: Path) -> Path:
    """The run of `whole`, copied to before PPO; gives its folder."""
    run = folder / "runs" / "small"
    shutil.copytree(whole, run)
    for stage in ("ppo", "evaluate"):
        shutil.rmtree(run / stage)
    write_recipe(folder)
    return run


RIVALS = {
    "rloo": "--ppo.advantage rloo --ppo.entropy_bonus 0.01",
    "grpo": "--ppo.advantage grpo --ppo.kl.charge loss --ppo.kl.controller fixed --ppo.kl.estimator k3",
    "best": "--ppo.advantage best --ppo.whiten false --ppo.kl.estimator k2 --ppo.kl.charge loss "
    "--ppo.kl.controller fixed",
    "reinforce": "--ppo.advantage reinforce --ppo.reward_scaling true --ppo.reward_clip 1.5",
}


@pytest.mark.parametrize("rival", list(RIVALS))
def test_a_rival_of_ppo_has_no_value_head_and_the_terms_that_were_asked_for(
    whole: Path, tmp_path: Path, rival: str
) -> None:
    run = only_ppo_is_left(whole, tmp_path)
    finish(stackllama(tmp_path, "ppo", "small.yaml", *RIVALS[rival].split()))
    assert not [name for name in load_file(run / "ppo/final/role.safetensors") if name.startswith("head.")]
    assert [name for name in load_file(whole / "ppo/final/role.safetensors") if name.startswith("head.")]
    lines = [json.loads(line) for line in (run / "ppo/metrics.jsonl").read_text().splitlines()]
    logged = set(lines[-1])
    assert not logged & {"value_loss", "value_clip_fraction", "explained_variance"}
    assert ("kl_loss" in logged) is (rival in ("grpo", "best"))
    assert ({"reward_scale", "reward_clipped"} <= logged) is (rival == "reinforce")
    ratios = {line["round"]: line["ratio_mean"] for line in reversed(lines)}
    assert ratios == {0.0: 1.0, 1.0: 1.0, 2.0: 1.0}  # of each round's first step


def test_a_rival_killed_at_a_random_moment_ends_with_the_same_bits_and_is_examined_as_ppo_is(
    whole: Path, tmp_path: Path
) -> None:
    words = [*RIVALS["rloo"].split(), "--ppo.reward_scaling", "true"]
    undisturbed = only_ppo_is_left(whole, tmp_path / "undisturbed")
    finish(stackllama(tmp_path / "undisturbed", "ppo", "small.yaml", *words))
    killed = only_ppo_is_left(whole, tmp_path)
    kill_and_go_on(tmp_path, "ppo", *words, draw=random.Random(3))
    assert final_weights(killed) == final_weights(undisturbed)
    finish(stackllama(tmp_path, "run", "small.yaml", *words))
    summary = json.loads((killed / "summary.json").read_text())
    assert {"reward_before", "reward_after", "kl", "win_rate"} <= summary["ppo"].keys()
    assert "<html" in (killed / "report.html").read_text()


def test_a_value_of_its_own_warms_up_and_killed_it_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    words = "--ppo.value own --ppo.value_warmup 1 --ppo.curriculum 0.7 --ppo.kl.controller stop --ppo.kl.target 1e-6"
    undisturbed = only_ppo_is_left(whole, tmp_path / "undisturbed")
    told = finish(stackllama(tmp_path / "undisturbed", "ppo", "small.yaml", *words.split()))
    # The policy is still in round 0 and moves in round 1, so round 2 is the first whose KL is above 0: the last one.
    log = [json.loads(line) for line in (undisturbed / "ppo/metrics.jsonl").read_text().splitlines()]
    assert {line["round"] for line in log} == {0.0, 1.0, 2.0}
    assert {line["ratio_mean"] for line in log if line["round"] == 0.0} == {1.0}
    assert {line["ratio_mean"] for line in log if line["round"] == 1.0} != {1.0}
    assert [line["kl_target_reached"] for line in log if line["round"] < 2.0] == [0.0] * 8
    assert {"value_loss", "explained_variance", "prompt_length"} <= log[-1].keys()
    assert "stopped" not in told
    assert not [name for name in load_file(undisturbed / "ppo/final/role.safetensors") if name.startswith("head.")]
    killed = only_ppo_is_left(whole, tmp_path)
    kill_and_go_on(tmp_path, "ppo", *words.split(), draw=random.Random(4))
    assert final_weights(killed) == final_weights(undisturbed)


DPO = ["--policy", "dpo", "--dpo.max_steps", "12", "--dpo.questions_per_step", "4", "--dpo.learning_rate", "1e-3"]
DPO += ["--watch.every", "5"]


def test_dpo_killed_at_a_random_moment_ends_with_the_same_bits_and_is_examined_as_a_policy(
    whole: Path, tmp_path: Path
) -> None:
    undisturbed = only_ppo_is_left(whole, tmp_path / "undisturbed")
    finish(stackllama(tmp_path / "undisturbed", "dpo", "small.yaml", *DPO))
    killed = only_ppo_is_left(whole, tmp_path)
    kill_and_go_on(tmp_path, "dpo", *DPO, draw=random.Random(5))
    assert final_weights(killed) == final_weights(undisturbed)
    for log in ("dpo/metrics.jsonl", "dpo/watch.jsonl"):
        assert (killed / log).read_bytes() == (undisturbed / log).read_bytes()
    looks = [json.loads(line) for line in (killed / "dpo/watch.jsonl").read_text().splitlines()]
    assert [look["rounds"] for look in looks] == [0, 5, 10, 12]
    assert looks[0]["kl"] == 0 != looks[-1]["kl"]
    first = json.loads((killed / "dpo/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (first["accuracy"], first["margin"], first["better_reward"]) == (pytest.approx(0.5), 0.0, 0.0)
    assert "next: stackllama report" in finish(stackllama(tmp_path, "evaluate", "small.yaml", *DPO))
    finish(stackllama(tmp_path, "report", "small"))
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["dpo"]["steps"] == 12
    best = max(looks[1:], key=lambda look: look["judge"])
    assert summary["dpo"]["chosen_step"] == best["step"]
    assert {"reward_before", "reward_after", "kl", "win_rate"} <= summary["ppo"].keys()
    assert summary["ppo"]["kl"] != 0
    page = (killed / "report.html").read_text()
    assert "SFT against DPO</h2>" in page
    assert f"The policy has the weights of step {best['step']}" in page
    assert finish(stackllama(tmp_path, "chat", "small", "--question", "Soil?", "--max-new-tokens", "4")).strip()


def test_dpo_in_full_trains_a_copy(whole: Path, tmp_path: Path) -> None:
    run = only_ppo_is_left(whole, tmp_path)
    # The method counts from SFT on, whose trunk is fp32 here already, as PPO in full wants it.
    stored = run / "recipe.yaml"
    stored.write_text(to_yaml(with_values(load_recipe(stored), {"dpo.method": "full"})), encoding="utf-8")
    words = ["--dpo.method", "full", "--dpo.loss", "ipo", "--dpo.max_steps", "2"]
    finish(stackllama(tmp_path, "dpo", "small.yaml", *DPO, *words))
    trunk, policy = (load_file(run / name) for name in ("sft/final/model.safetensors", "dpo/final/role.safetensors"))
    assert trunk.keys() <= policy.keys()
    assert any(not torch.equal(trunk[name], policy[name]) for name in trunk)


def test_an_adapter_that_sft_keeps_live_is_noted_and_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "MERGE_LOSS", float("-inf"))
    changed = {"base.model": str(whole / SFT / FINAL), "sft.method": "lora", "sft.max_steps": "2"}
    threads = str(torch.get_num_threads())
    recipe = load_recipe(write_recipe(tmp_path), {"folder": str(tmp_path), "compute.threads": threads} | changed)
    with open_run(recipe) as run:
        run_data(recipe, run)
        sft.run_sft(recipe, run)
        assert run.outputs(SFT).keys() == {FINAL, FROZEN}
        assert load_trunk(recipe, run.folder).trunk.frozen == (SFT,)


@pytest.fixture(scope="module")
def in_four_bits(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The run folder of a journey by adapters over a base in 4 bits, and the words that make it so."""
    folder = tmp_path_factory.mktemp("nf4")
    write_recipe(folder, "lora")
    words = ["--base.model", str(whole / SFT / FINAL), "--base.quantization", "nf4", "--sft.method", "lora"]
    finish(stackllama(folder, "run", "small.yaml", *words))
    return folder / "runs" / "small", words


def test_over_a_base_in_four_bits_the_sft_adapter_stays_live(
    whole: Path, in_four_bits: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run, _ = in_four_bits
    assert set(final_weights(run)) == {
        "sft/final/model.safetensors",
        "sft/frozen/role.safetensors",
        "reward/final/role.safetensors",
        "judge/final/role.safetensors",
        "ppo/final/role.safetensors",
    }
    # What SFT leaves is the base as it was, and all later stages pack the very same bits of it.
    kept, base = (load_file(folder / SFT / FINAL / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.items())
    recipe = load_recipe(run / "recipe.yaml")
    trunk = load_trunk(recipe, run).trunk
    assert trunk.quantized
    assert trunk.frozen == (SFT,)
    packed = load_base(recipe.base.model, attention="forest").model
    quantize(packed, packed.device)
    trunk.drop(SFT)
    found = trunk.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in packed.state_dict().items())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["sft"]["perplexity_after"] == summary["sft"]["perplexity_unmerged"]
    assert summary["sft"]["perplexity_after"] < summary["sft"]["perplexity_before"]
    assert summary["ppo"]["kl"] is not None
    output = finish(stackllama(tmp_path, "score", str(run), "--question", "Soil?", "--answer", "Use sand."))
    assert "Use sand." in output


def test_killed_over_a_base_in_four_bits_it_ends_with_the_same_bits(
    in_four_bits: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run, words = in_four_bits
    write_recipe(tmp_path, "lora")
    draw = random.Random(2)
    finish(stackllama(tmp_path, "data", "small.yaml", *words))
    for stage in ("sft", "reward"):
        kill_and_go_on(tmp_path, stage, *words, draw=draw)
    expected, found = final_weights(run), final_weights(tmp_path / "runs" / "small")
    assert len(found) == 4
    assert all(expected[name] == digest for name, digest in found.items())


def test_after_data_without_a_pair_the_same_name_takes_looser_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    site(Path("a.test"), [question(1), answer(2, 1, Score="1"), answer(3, 1, Score="9")])
    Path("mine.yaml").write_text("data: {source: a.test}")
    assert main(["data", "mine.yaml", "--data.preferences.min_gap", "9"]) == 2
    assert "or loosen data.preferences" in capsys.readouterr().err
    assert Path("runs/mine/data/work").exists()
    assert main(["data", "mine.yaml"]) == 0
    assert store.read_manifest(Path("runs/mine/data")).total("pairs") == 1
    assert not Path("runs/mine/data/work").exists()
    assert main(["data", "mine.yaml", "--data.preferences.min_gap", "9"]) == 2
    assert "was begun with another recipe" in capsys.readouterr().err


def test_an_embedded_community_is_not_made_of_the_work_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("data: {source: embedded, questions: 60}")
    with monkeypatch.context() as broken:
        broken.setattr("stackllama.data.building.build._commit", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["data", "mine.yaml", "--seed", "1"])
    for name in ("mine", "fresh"):
        assert main(["data", "mine.yaml", "--seed", "2", "--name", name]) == 0
    assert stage_outputs(Path("runs/mine"), "data") == stage_outputs(Path("runs/fresh"), "data")
