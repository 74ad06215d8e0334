from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import MistralConfig

from stackllama import planning
from stackllama.cli import main
from stackllama.recipe_load import load_recipe, with_values

Capture = pytest.CaptureFixture[str]
PROGRAM = 500_000_000


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own share as a number, since it takes seconds to measure."""
    monkeypatch.setattr(planning, "program_bytes", lambda: PROGRAM)


def test_plan_prints_every_stage_and_that_it_fits(capsys: Capture) -> None:
    assert main(["plan", "quickstart", "--memory", "64"]) == 0
    out, err = capsys.readouterr()
    for stage in ("sft", "reward", "judge", "ppo", "evaluate"):
        assert f"\n{stage} " in f"\n{out}"
    assert "64.0 GB: it fits" in out
    assert "next: stackllama run quickstart" in err


def test_dpo_takes_the_place_of_ppo_and_its_logits_come_on_top_of_reward_training(capsys: Capture) -> None:
    assert main(["plan", "quickstart", "--memory", "64", "--policy", "dpo"]) == 0
    out = capsys.readouterr().out
    assert "\ndpo " in out
    assert "\nppo " not in out
    recipe = load_recipe("smollm2-beer", {"policy": "dpo"})
    found = planning.peaks(recipe, program=PROGRAM)
    assert found["dpo"].parts["activations"] == found["reward"].parts["activations"]
    assert found["dpo"].peak > found["reward"].peak
    full = planning.peaks(with_values(recipe, {"dpo.method": "full"}), program=PROGRAM)
    assert full["dpo"].parts["copies"] > found["dpo"].parts["copies"]
    assert full["evaluate"].peak > found["evaluate"].peak


def test_what_it_advises_fits_when_it_is_done() -> None:
    recipe = load_recipe("smollm2-beer", {"base": "16m", "sft.method": "full", "ppo.method": "full"})
    highest = max(moment.peak for moment in planning.peaks(recipe, program=PROGRAM).values())
    for limit in (highest - 1, highest * 4 // 5):
        change = planning.setting_to_change(recipe, limit, program=PROGRAM)
        assert change is not None
        after = planning.peaks(with_values(recipe, change.values), program=PROGRAM)
        assert max(moment.peak for moment in after.values()) == change.peak <= limit
        assert all(f"{key}: {value}" in str(change) for key, value in change.values.items())


def test_adapters_that_do_not_fit_over_a_large_base_are_advised_four_bits(tmp_path: Path, capsys: Capture) -> None:
    # 7.1 billion numbers: 14.2 GB in bf16 alone, and 13 GB more while the SFT adapter is merged.
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    MistralConfig(vocab_size=32_000, num_key_value_heads=8, **shape).save_pretrained(tmp_path)
    words = ["plan", "smollm2-beer", "--base.model", str(tmp_path), "--compute.dtype", "bfloat16", "--gpus", "1"]
    assert main([*words, "--memory", "16"]) == 0
    assert "base.quantization: nf4 would fit" in capsys.readouterr().out
    assert main([*words, "--memory", "16", "--base.quantization", "nf4"]) == 0
    assert "there are 16.0 GB: it fits" in capsys.readouterr().out


def test_where_nothing_fits_it_says_so(capsys: Capture) -> None:
    assert main(["plan", "quickstart", "--memory", "0.1"]) == 0
    assert "no setting makes it fit into 100 MB" in capsys.readouterr().out


def test_gpus_share_the_weights(capsys: Capture) -> None:
    recipe = load_recipe("smollm2-beer", {"sft.method": "full"})
    one, four = (planning.peaks(recipe, program=PROGRAM, gpus=count)["sft"].parts for count in (1, 4))
    assert four["optimizer"] == one["optimizer"] / 4
    assert main(["plan", "smollm2-beer", "--gpus", "4", "--memory", "24"]) == 0
    assert "on each of 4 GPUs; there are 24.0 GB: it fits" in capsys.readouterr().out


def test_a_value_of_its_own_is_shown_with_its_price() -> None:
    shared, own = (
        planning.peaks(load_recipe("smollm2-beer", {"ppo.value": value}), program=PROGRAM)["ppo"].parts
        for value in ("shared", "own")
    )
    # Policy and reward model have adapters of one shape: the optimizer has two of them, and so have the gradients.
    assert own["optimizer"] == 2 * shared["optimizer"]
    assert own["gradients"] == 2 * shared["gradients"]
    assert own["adapters"] - shared["adapters"] == shared["gradients"]


@pytest.mark.parametrize("words", [["--memory", "none"], ["--memory", "0"], ["--gpus", "-1"], ["--gpus"]])
def test_options_that_cannot_be(words: list[str]) -> None:
    try:
        code: object = main(["plan", "quickstart", *words])
    except SystemExit as exited:  # as argparse does
        code = exited.code
    assert code == 2


def test_a_base_that_is_not_there_is_an_error(capsys: Capture) -> None:
    assert main(["plan", "quickstart", "--base", "./nowhere"]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_errors_that_are_no_lack_of_memory_stay_what_they_are() -> None:
    assert planning.is_out_of_memory(MemoryError())
    assert not planning.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


LIMITED = """
import resource, sys
import stackllama.stages.table, stackllama.planning
from stackllama.cli import main
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 600_000_000, resource.RLIM_INFINITY))
sys.exit(main(["sft", *sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of the address space is Linux's")
@pytest.mark.slow
def test_memory_that_runs_out_in_training_names_the_setting(tmp_path: Path) -> None:
    # A row of 16,384 tokens keeps about 48 kB a token in this model: 790 MB, where 600 MB are left.
    words = [
        "quickstart",
        "--folder",
        str(tmp_path),
        "--data.questions",
        "1000",
        "--sft.max_tokens",
        "128",
        "--compute.threads",
        "1",
    ]
    words += ["--base", "embedded", "--sft.tokens_per_step", "16384", "--compute.row_tokens", "16384"]
    assert subprocess.run([sys.executable, "-m", "stackllama.cli", "data", *words]).returncode == 0
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "memory ran out in sft, which is predicted to need" in done.stderr
    assert "compute.row_tokens: " in done.stderr
    assert "Traceback" not in done.stderr
