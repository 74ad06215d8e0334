"""Sampling for training with vLLM, on the same GPU and in the same process as the trainer.

vLLM holds weights of its own: the trunk, read from its folder. The policy is an adapter over it, so what changes from
round to round is small: it is written as an adapter folder in peft's format, loaded under a number that was never used
before, and unloaded when the round is sampled. Cached keys and values are known by the adapter's name and folder, so
none outlives its weights.

Each request has a seed of its own, from (seed, request): what is sampled beside it changes nothing but rounding. Its
noise is vLLM's, so the tokens are not those of `engine.py`.

Left out: policies that are copies of the trunk (all of their weights would have to be handed over), trunks in 4 bits
(vLLM packs them differently), several GPUs. Evaluation, watching and the chat use `engine.py`, which repeats its noise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stackllama.errors import ModelError, TrainingError
from stackllama.model.roles import Role, Trunk
from stackllama.rollout.engine import Request, Response, Sampling, Stopped
from stackllama.rollout.sampling import request_seeds

SEQUENCES = 256
"""Most sequences that grow at a time."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for: an adapter takes the next one."""
BLOCK = 128
"""Places that vLLM gives a sequence at a time, at most; it is 16 on a GPU."""

_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: nothing is pickled, and the GPU's memory is shared with torch
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer has the same threads
    "GLOO_SOCKET_IFNAME": "lo",  # a group of one process still listens
    "NCCL_SOCKET_IFNAME": "lo",
}
"""Read when vLLM is loaded."""

_STOPPED: dict[str | None, Stopped] = {"stop": "eos", "length": "length"}


def check_installed() -> None:
    """Raise ModelError where the package is missing; it is not imported."""
    if importlib.util.find_spec("vllm") is None:
        raise ModelError(
            "ppo.sampler is vllm, but the package vllm is not installed; pip install 'stackllama[vllm]' (Linux with "
            "CUDA), or set ppo.sampler to own"
        )


def write_adapter(folder: Path, trunk: Trunk, role: str) -> int:
    """Write what a role adds to the trunk, as a LoRA adapter in peft's format; gives its rank.

    A frozen adapter under the role is put beside its own: B A + B' A' = [B B'] [A; A'], so the ranks add up. alpha /
    rank is multiplied into B, in fp32.
    """
    parts = [(trunk.adapters[name], trunk.state(name)) for name in (*trunk.frozen, role)]
    layers = sorted({name.removesuffix(".lora_A.weight") for _, state in parts for name in state if ".lora_A." in name})
    rank = sum(lora.rank for lora, _ in parts)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        found = [
            (lora, state.get(f"{layer}.lora_A.weight"), state.get(f"{layer}.lora_B.weight")) for lora, state in parts
        ]
        wide = [(lora, down, up) for lora, down, up in found if down is not None and up is not None]
        down, up = (
            torch.cat([a for _, a, _ in wide]),
            torch.cat([b * (lora.alpha / lora.rank) for lora, _, b in wide], 1),
        )
        missing = rank - len(down)  # an adapter that leaves this layer alone
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, missing)).cpu()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.nn.functional.pad(up, (0, missing)).cpu()
    page = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
        "inference_mode": True,
    }
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(page, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return rank


class VllmSampler:
    """Samples one role of a trunk, with its adapter as it is at each call.

    folder: the trunk's own weights on disk, adapters apart; longest: tokens of the longest prompt with its response;
    requests: how many come in one call. The memory for keys and values is what that many need, but at most `SEQUENCES`
    at a time; weights and working memory come on top.
    """

    def __init__(self, folder: Path, trunk: Trunk, role: str, *, longest: int, requests: int) -> None:
        """Load the weights.

        Raises:
            ModelError: when vLLM is missing or cannot load them, or the role is no adapter over a dense trunk.
        """
        check_installed()
        self._trunk, self._role = trunk, role
        self._numbers = itertools.count(1)
        rank = _fitting_rank(trunk, role)
        sequences = min(requests, SEQUENCES)
        os.environ.update(_PROCESS)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        try:
            with _untouched(trunk.device):
                self._vllm = vllm.LLM(
                    model=str(folder),
                    skip_tokenizer_init=True,  # token ids in, token ids out
                    generation_config="vllm",  # what a model's folder says of sampling does not count
                    trust_remote_code=False,
                    dtype=str(trunk.precision).removeprefix("torch."),
                    enable_lora=True,
                    max_loras=1,
                    max_lora_rank=rank,
                    max_model_len=longest,
                    max_num_seqs=sequences,
                    kv_cache_memory_bytes=_cache_bytes(trunk, longest, sequences),
                    gpu_memory_utilization=0.01,  # only a check, as the line above says what is taken
                    enable_prefix_caching=True,  # a prompt is read once for all of its samples
                    enforce_eager=trunk.device.type == "cpu",
                    seed=0,
                )
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise ModelError(
                f"vLLM {vllm.__version__} cannot load {folder} ({error}); set ppo.sampler to own"
            ) from error

    def __call__(self, role: Role, requests: Sequence[Request], how: Sampling, /) -> list[Response]:
        """Sample every request, in order.

        Raises:
            TrainingError: when vLLM ends a response for another reason than its EOS or its length.
        """
        assert role.name == self._role, f"made for {self._role}"
        assert how.temperature == how.top_p == 1.0, "training samples from the policy itself"
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=list(one.prompt)) for one in requests]
        seeds = request_seeds(how.seed, [one.id for one in requests])
        wanted = [
            SamplingParams(
                temperature=1.0,
                max_tokens=how.max_new_tokens,
                stop_token_ids=[how.eos_id],
                ignore_eos=True,  # vLLM's own idea of EOS; the line above has ours
                logprobs=0,  # the sampled token's alone
                detokenize=False,
                seed=seed,
            )
            for seed in seeds
        ]
        with _untouched(self._trunk.device), self._loaded_adapter() as adapter:
            outputs = self._vllm.generate(prompts, wanted, lora_request=adapter, use_tqdm=False)
        return [_response(one.outputs[0]) for one in outputs]

    @contextlib.contextmanager
    def _loaded_adapter(self) -> Iterator[Any]:
        """The role's adapter as it is now, in vLLM under a new number while the block runs."""
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        with tempfile.TemporaryDirectory(prefix="stackllama-adapter-") as folder:
            write_adapter(Path(folder), self._trunk, self._role)
            yield LoRARequest(f"{self._role}-{number}", number, folder)
            self._vllm.llm_engine.remove_lora(number)


def _response(output: Any) -> Response:
    """One of vLLM's completions as ours."""
    if output.finish_reason not in _STOPPED:
        raise TrainingError(
            f"vLLM ended a response with {output.finish_reason!r}, neither its EOS nor its length; "
            "set ppo.sampler to own"
        )
    tokens = tuple(output.token_ids)
    logprobs = tuple(float(known[token].logprob) for token, known in zip(tokens, output.logprobs, strict=True))
    return Response(tokens, logprobs, _STOPPED[output.finish_reason])


def _fitting_rank(trunk: Trunk, role: str) -> int:
    """The rank that vLLM is to make room for. Raises ModelError where the role is nothing that it can be given."""
    if trunk.quantized:
        raise ModelError(
            "vLLM cannot sample over 4-bit weights here; set base.quantization to off, or ppo.sampler to own"
        )
    if role not in trunk.adapters:
        raise ModelError(
            f"{role} is trained in full, vLLM is given adapters: set ppo.method to lora, or ppo.sampler to own"
        )
    rank = sum(trunk.adapters[name].rank for name in (*trunk.frozen, role))
    if rank > RANKS[-1]:
        raise ModelError(f"adapters of rank {rank} together are over vLLM's {RANKS[-1]}; lower ppo.lora.rank")
    return next(room for room in RANKS if room >= rank)


def _cache_bytes(trunk: Trunk, longest: int, sequences: int) -> int:
    """Bytes of keys and values of so many sequences, each of the longest length."""
    config = trunk.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = sequences * -(-longest // BLOCK) + 1  # vLLM keeps one for itself
    return int(2 * config.num_hidden_layers * heads * size * trunk.precision.itemsize * BLOCK * blocks)


@contextlib.contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Let vLLM run in the type it was told, whatever the role multiplies in, and leave torch's random numbers alone."""
    with (
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        yield
