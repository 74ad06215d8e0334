"""What vLLM samples is the policy as it is now. With vLLM itself where it is installed, else with a fake of it."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import stackllama.model.attention  # noqa: F401  (registers "forest")
from stackllama.errors import ModelError, TrainingError
from stackllama.model.roles import LoRA, Trunk
from stackllama.rollout import vllm
from stackllama.rollout.engine import Request, Response, Sampling
from stackllama.rollout.vllm import VllmSampler, write_adapter
from stackllama.tokens.forest import Tree, branch_targets, plant
from tests.rollout import fake_vllm

REAL = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.filterwarnings("default" if REAL else "error")  # vLLM has warnings of its own
EOS, NEW = 2, 24
HOW = Sampling(seed=3, max_new_tokens=NEW, eos_id=EOS)
PROMPTS = ((5, 6, 7), (8, 9, 10, 11, 12, 13, 14), (5, 6, 7), (20,) * 11)
REQUESTS = [Request(at, PROMPTS[at % 4]) for at in range(12)]
ATTENTION = LoRA(4, 8.0, 0.0, ("q_proj", "v_proj"))
EVERYWHERE = LoRA(3, 3.0, 0.0, ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in vllm._PROCESS:
            patch.setenv(name, os.environ.get(name, ""))  # put back what the sampler sets
        if not REAL:
            fake_vllm.install(patch)
        yield


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """Heads of 32, the smallest that vLLM has kernels for; sharp enough for a wrong adapter to show."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attn_implementation="forest",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def folder(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trunk")
    base.save_pretrained(path)
    return path


def move(trunk: Trunk, role: str, *, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in trunk.trainable(role).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)


@pytest.fixture(scope="module")
def trunk(base: LlamaForCausalLM) -> Trunk:
    """A policy over an SFT adapter that stays live on other layers."""
    made = Trunk(copy.deepcopy(base), precision=torch.float32)
    made.add_adapter("sft", ATTENTION, seed=0)
    move(made, "sft", seed=1)
    made.freeze_under("sft")
    made.add_adapter("policy", EVERYWHERE, seed=0)
    move(made, "policy", seed=2)
    made.add_head("policy", "value", spread=0.1, seed=0)
    return made


@pytest.fixture(scope="module")
def sampler(folder: Path, trunk: Trunk) -> VllmSampler:
    return VllmSampler(folder, trunk, "policy", longest=11 + NEW, requests=12)


def sampled(sampler: VllmSampler, trunk: Trunk, requests: list[Request]) -> list[Response]:
    with trunk.use("policy") as role:
        return sampler(role, requests, HOW)


def trained(trunk: Trunk, found: list[Response]) -> torch.Tensor:
    """Log-probabilities by the trainer."""
    forest = plant([Tree(request.prompt, (one.tokens,)) for request, one in zip(REQUESTS, found, strict=True)])
    with trunk.use("policy") as role:
        return role.logprobs(role.hidden(forest), branch_targets(forest))


def logprobs(found: list[Response]) -> torch.Tensor:
    return torch.tensor([logprob for one in found for logprob in one.logprobs])


def test_each_call_samples_the_policy_as_it_is_and_leaves_nothing_loaded(sampler: VllmSampler, trunk: Trunk) -> None:
    before = sampled(sampler, trunk, REQUESTS)
    expected = trained(trunk, before)
    assert (logprobs(before) - expected).norm() <= 1e-5 * expected.norm()
    assert sampler._vllm.llm_engine.list_loras() == set()
    move(trunk, "policy", seed=7)
    assert (trained(trunk, before) - expected).norm() > 0.1 * expected.norm()
    after = sampled(sampler, trunk, REQUESTS)
    expected = trained(trunk, after)
    assert (logprobs(after) - expected).norm() <= 1e-5 * expected.norm()
    assert sampler._vllm.llm_engine.list_loras() == set()


def test_a_response_ends_in_eos_or_at_its_length(sampler: VllmSampler, trunk: Trunk) -> None:
    found = sampled(sampler, trunk, REQUESTS)
    for one in found:
        assert len(one.tokens) == len(one.logprobs)
        assert EOS not in one.tokens[:-1]
        assert (one.tokens[-1] == EOS) is (one.stopped == "eos")
        assert one.stopped == "eos" or len(one.tokens) == NEW
    assert {one.stopped for one in found} == {"eos", "length"}


def test_a_requests_tokens_do_not_depend_on_its_company(sampler: VllmSampler, trunk: Trunk) -> None:
    together = [one.tokens for one in sampled(sampler, trunk, REQUESTS)]
    backwards = [one.tokens for one in sampled(sampler, trunk, REQUESTS[::-1])][::-1]
    alone = [sampled(sampler, trunk, [request])[0].tokens for request in REQUESTS[:4]]
    assert backwards == together
    assert alone == together[:4]
    assert len(set(together)) == len(REQUESTS)  # requests 0 and 2 ask the same


def test_it_leaves_the_trainers_random_numbers_alone(folder: Path, trunk: Trunk, sampler: VllmSampler) -> None:
    before = torch.get_rng_state()
    sampled(sampler, trunk, REQUESTS[:2])
    assert torch.equal(torch.get_rng_state(), before)


def test_stacked_adapters_add_up_layer_by_layer(trunk: Trunk, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert write_adapter(tmp_path, trunk, "policy") == 4 + 3
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    assert len(layers) == 2 * 6  # q, k, v, o, up, down of two layers
    for layer in layers:
        found = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        module = trunk.model.get_submodule(layer.removeprefix("base_model.model."))
        expected = sum(module.get_delta_weight(name) for name in ("sft", "policy") if name in module.lora_A)
        assert torch.allclose(found, expected, atol=1e-5), layer


def test_what_it_cannot_be_given_is_refused(base: LlamaForCausalLM, folder: Path, tmp_path: Path) -> None:
    full = Trunk(copy.deepcopy(base), precision=torch.float32)
    full.add_copy("policy")
    with pytest.raises(ModelError, match=r"policy is trained in full.*ppo\.method to lora"):
        VllmSampler(folder, full, "policy", longest=32, requests=1)
    wide = Trunk(copy.deepcopy(base), precision=torch.float32)
    wide.add_adapter("policy", LoRA(513, 8.0, 0.0, ("q_proj",)), seed=0)
    with pytest.raises(ModelError, match=r"rank 513 together are over vLLM's 512; lower ppo\.lora\.rank"):
        VllmSampler(folder, wide, "policy", longest=32, requests=1)


def test_a_model_that_it_cannot_load_is_named(trunk: Trunk, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vLLM .* cannot load .*nothing.*ppo\.sampler to own"):
        VllmSampler(tmp_path / "nothing", trunk, "policy", longest=32, requests=1)


def test_a_missing_package_is_named_with_its_extra(folder: Path, trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'stackllama\[vllm\]'") as caught:
        VllmSampler(folder, trunk, "policy", longest=32, requests=1)
    assert caught.value.exit_code == 2


def test_another_end_than_eos_or_length_ends_the_training() -> None:
    with pytest.raises(TrainingError, match="'abort', neither its EOS nor its length"):
        vllm._response(fake_vllm.Completion([5], [{5: fake_vllm.Logprob(-1.0)}], "abort"))


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_room_is_made_for_the_next_rank(base: LlamaForCausalLM, rank: int, room: int) -> None:
    trunk = Trunk(copy.deepcopy(base), precision=torch.float32)
    trunk.add_adapter("policy", LoRA(rank, 8.0, 0.0, ("q_proj",)), seed=0)
    assert vllm._fitting_rank(trunk, "policy") == room


def test_memory_for_keys_and_values(trunk: Trunk) -> None:
    # 2 layers x 1 head x 32 numbers x 4 bytes x 2 (keys, values) = 512 bytes a place. 130 places take 2 blocks of 128:
    # 3 sequences take 6 blocks, and vLLM keeps one: 7 * 128 * 512 bytes.
    assert vllm._cache_bytes(trunk, 130, 3) == 7 * 128 * 512
