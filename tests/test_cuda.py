"""On a GPU everything is as it is on the CPU. Left out where torch sees no GPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stackllama.cli import main
from stackllama.model import memory
from stackllama.model.memory import Machine, Method
from stackllama.model.roles import REFERENCE, LoRA, Role, Trunk
from stackllama.objectives import reward
from stackllama.objectives.base import Sums
from stackllama.objectives.sft import SftObjective
from stackllama.rollout.engine import Request, Sampling, sample
from stackllama.rollout.experience import response_scores
from stackllama.tokens.batches import SftRow, on_device
from stackllama.tokens.forest import Forest, Tree, branch_targets, last_tokens, plant, root_targets
from stackllama.tokens.packing import pack
from stackllama.tokens.sources import PairedTree, reward_row, sft_row
from tests.model.tiny import CONFIGS, random_trees, tiny_model
from tests.stages.test_journey import RECIPE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CUDA = torch.device("cuda")


def trunk_on(device: str, kind: str = "llama", precision: torch.dtype = torch.float32) -> Trunk:
    """A trunk with an adapter "policy" that changes much, and a reward head on it: equal on every device."""
    trunk = Trunk(tiny_model(kind).to(device), precision=precision)
    trunk.add_adapter("policy", LoRA(4, 8.0, 0.0, EVERY), seed=1)
    trunk.add_head("policy", reward.HEAD, spread=0.1, seed=2)
    draw = torch.Generator().manual_seed(3)
    for parameter in trunk.trainable("policy").values():
        if parameter.ndim == 2:
            parameter.data += (0.1 * torch.randn(parameter.shape, generator=draw)).to(device)
    return trunk


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def learned(trunk: Trunk, forest: Forest) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of the branches, and the gradients of their sum and of the branches' scores."""
    with trunk.use("policy", training=True) as role:
        hidden_TD = role.hidden(forest)
        logprob_N = role.logprobs(hidden_TD, branch_targets(forest))
        score_B = role.score(reward.HEAD, role.hidden_at(forest, last_tokens(forest)))
        (logprob_N.sum() + score_B.square().sum()).backward()
    grads = {name: one.grad for name, one in trunk.trainable("policy").items()}
    return logprob_N, {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_log_probabilities_and_gradients_are_those_of_the_cpu(kind: str) -> None:
    forest = plant(random_trees(2))
    (logprob_N, grads), (wanted_N, wanted) = (learned(trunk_on(device, kind), forest) for device in ("cuda", "cpu"))
    assert apart(logprob_N, wanted_N) < 1e-5
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert apart(grad, wanted[name]) < 1e-4, name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_packed_is_separate(precision: torch.dtype) -> None:
    trees = random_trees(4)
    trunk = trunk_on("cuda", precision=precision)
    packed_N, _ = learned(trunk, plant(trees))
    alone = [Tree(tree.root, (branch,), tree.key) for tree in trees for branch in tree.branches]
    alone_N = torch.cat([learned(trunk, plant([tree]))[0] for tree in alone])
    assert apart(packed_N, alone_N) < (1e-5 if precision == torch.float32 else 2e-2)


def test_rows_of_another_length_are_the_same_to_the_bit_in_what_they_share() -> None:
    """The kernels of the old log-probabilities and of the first minibatch must be one: step 0 has ratio 1."""
    forest = plant(random_trees(5))
    for precision in (torch.float32, torch.bfloat16):
        trunk = trunk_on("cuda", precision=precision)
        with trunk.use("policy") as role:
            before_N = role.logprobs(role.hidden(forest), branch_targets(forest))
        with trunk.use("policy", training=True) as role:
            after_N = role.logprobs(role.hidden(forest), branch_targets(forest))
        assert torch.equal(before_N, after_N.detach())


def test_checkpointing_changes_no_gradient() -> None:
    forest = plant(random_trees(2))
    plain, checkpointed = trunk_on("cuda"), trunk_on("cuda")
    checkpointed.recompute_activations()
    wanted, found = learned(plain, forest)[1], learned(checkpointed, forest)[1]
    for name, grad in found.items():
        assert apart(grad, wanted[name]) < 1e-6, name


def test_a_row_does_not_wait_for_the_gpu() -> None:
    """No host synchronisation between the row and the end of its backward."""
    pairs = ((0, 1),)
    trees = [
        PairedTree(Tree((5, 6, 7), ((8, 9), (10, 11, 12)), key), pairs, (0.0,), (0, 1), 1.0, 1.0) for key in range(3)
    ]
    rewarded, learnt = reward_row(trees), sft_row([one.tree for one in trees], everything=False)
    trunk = trunk_on("cuda", precision=torch.bfloat16)
    rewarding = reward.RewardObjective("policy", centring=0.1, length_penalty=0.1)
    works: list[Callable[[Role], Sums]] = [
        lambda role: rewarding(role, on_device(rewarded, CUDA)),
        lambda role: SftObjective()(role, on_device(learnt, CUDA)),
    ]
    for mode in ("default", "error"):  # the first round compiles
        for work in works:
            with trunk.use("policy", training=True) as role:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    torch.stack(list(work(role).losses.values())).sum().backward()
                finally:
                    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_what_is_sampled_is_what_is_scored_and_what_the_cpu_samples(kind: str) -> None:
    how = Sampling(seed=0, max_new_tokens=24, eos_id=2)
    requests = [Request(at, tuple(range(5, 9 + at))) for at in range(9)]
    found = {}
    for device in ("cuda", "cpu"):
        trunk = trunk_on(device, kind)
        with trunk.use("policy") as role:
            found[device] = sample(role, requests, how)
        trees = [
            Tree(one.prompt, (got.tokens,), at)
            for at, (one, got) in enumerate(zip(requests, found[device], strict=True))
        ]
        with trunk.use("policy") as role:
            forest = plant(trees)
            scored_N = role.logprobs(role.hidden(forest), branch_targets(forest))
        sampled_N = torch.tensor([one for got in found[device] for one in got.logprobs])
        assert apart(sampled_N, scored_N) < 1e-4
        scores = response_scores(trunk, "policy", trees, eos_id=2, row_tokens=512)
        assert scores.device.type == "cpu"
    same = sum(a.tokens == b.tokens for a, b in zip(found["cuda"], found["cpu"], strict=True))
    assert same >= 8  # a draw may fall on the other side of a border that rounding moved


def test_merging_folds_in_what_was_live() -> None:
    trunk, forest = trunk_on("cuda"), plant(random_trees(2))
    live_N, _ = learned(trunk, forest)
    trunk.merge("policy")
    with trunk.use(REFERENCE) as role:
        assert apart(role.logprobs(role.hidden(forest), branch_targets(forest)), live_N) < 1e-5


def test_the_fitted_head_is_that_of_the_cpu() -> None:
    trees = [
        PairedTree(Tree((5, 6, key), ((8, 9 + key), (10, 11, 12 + key)), key), ((0, 1),), (0.0,), (0, 1), 1.0, 1.0)
        for key in range(40)
    ]
    heads = []
    for device in ("cuda", "cpu"):
        trunk = trunk_on(device)
        reward.fit_head(trunk, "policy", [reward_row(row) for row in pack(trees, 128)])
        heads.append(trunk.trainable("policy")["head.reward.weight"])
    assert apart(*heads) < 1e-3


SIZES: dict[str, tuple[tuple[int, int, int, int, int], int | None, int]] = {
    "small lora": ((512, 1536, 8, 8, 4), 16, 4096),
    "middle full": ((1024, 2816, 12, 16, 16), None, 4096),
    "1b lora": ((2048, 5632, 22, 32, 32), 16, 8192),
}
"""Hidden and feed-forward size, layers, heads and those of keys; rank; tokens of a row."""


@pytest.mark.parametrize("size", SIZES)
def test_the_peak_is_within_15_percent_of_the_prediction(size: str) -> None:
    (hidden, feed_forward, layers, heads, key_heads), rank, tokens = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=32000,
    )
    gc.collect()
    torch.cuda.empty_cache()
    used = torch.cuda.memory_allocated()
    with CUDA:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="forest")
    trunk = Trunk(model if rank is None else model.to(torch.bfloat16), precision=torch.bfloat16)
    if rank is None:
        trunk.train_in_place("sft")
    else:
        trunk.add_adapter("sft", LoRA(rank, 32.0, 0.0, EVERY), seed=0)
    parameters = trunk.trainable("sft")
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-5, fused=True)
    forest = plant([Tree(tuple(range(5, 5 + 1024)), (), key) for key in range(tokens // 1024)])
    row = SftRow(forest, root_targets(forest))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        with trunk.use("sft", training=True) as role:
            SftObjective()(role, on_device(row, trunk.device)).losses["loss"].backward()
        optimizer.step()
    machine = Machine(0, 4 if rank is None else 2, 2, gpus=1)
    method = Method(rank, () if rank is None else EVERY)
    moment = memory.training(
        memory.shape_of(config), machine, method, forest.segments, in_place=True, scored=len(row.targets.label_N)
    )
    measured = torch.cuda.max_memory_allocated() - used
    predicted = moment.peak - moment.parts["program"]
    told = {part: round(count / 1e6) for part, count in moment.parts.items()}
    print(f"\n{size}: predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, reserved "
          f"{torch.cuda.max_memory_reserved() / 1e6:.0f} MB; {told}")  # fmt: skip
    assert abs(predicted / measured - 1) < 0.15


def test_the_whole_journey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = (
        RECIPE.replace("METHOD", "lora").replace("device: cpu", "device: cuda").replace("dropout: 0.1", "dropout: 0")
    )
    (tmp_path / "small.yaml").write_text(recipe, encoding="utf-8")
    assert main(["run", "small.yaml"]) == 0
    run = tmp_path / "runs" / "small"
    steps = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["ratio_mean"] == 1.0
    assert steps[0]["kl"] == 0.0
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage["stages"]["ppo"]["environment"]["accelerator"] == torch.cuda.get_device_name()
    assert main(["chat", str(run), "--question", "What is a stack?"]) == 0
