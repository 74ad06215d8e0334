"""The few calls of vLLM that are used, on transformers and peft: slow and plain, and it reads what it is given.

`install` puts it in vLLM's place. It also does what vLLM does to the process: it seeds torch's random numbers.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int
    detokenize: bool
    seed: int


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass(frozen=True)
class Logprob:
    logprob: float


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    outputs: list[Completion]


class Adapters:
    """Loads an adapter the first time that its number is seen, as vLLM does; its name would be its cache's key."""

    def __init__(self, model: Any, *, rank: int) -> None:
        self._model, self._rank = model, rank
        self._loaded: dict[int, Any] = {}
        self._names: set[str] = set()

    def get(self, lora: LoRARequest) -> Any:
        if lora.lora_int_id not in self._loaded:
            assert lora.lora_name not in self._names, "cached keys and values of older weights would be found"
            self._names.add(lora.lora_name)
            page = json.loads((Path(lora.lora_path) / "adapter_config.json").read_text("utf-8"))
            assert page["r"] <= self._rank, "more than room was made for"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it
                self._loaded[lora.lora_int_id] = PeftModel.from_pretrained(copy.deepcopy(self._model), lora.lora_path)
        return self._loaded[lora.lora_int_id]

    def remove_lora(self, number: int) -> bool:
        return self._loaded.pop(number, None) is not None

    def list_loras(self) -> set[int]:
        return set(self._loaded)


class LLM:
    def __init__(
        self, *, model: str, dtype: str, max_lora_rank: int, max_model_len: int, seed: int, **rest: object
    ) -> None:
        torch.manual_seed(seed)
        own = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype], attn_implementation="eager").eval()
        self._longest = max_model_len
        self.llm_engine = Adapters(own, rank=max_lora_rank)

    @torch.no_grad()
    def generate(
        self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], *, lora_request: Any, use_tqdm: bool
    ) -> list[RequestOutput]:
        assert not torch.is_autocast_enabled("cpu"), "the trainer's types are not the sampler's"
        torch.rand(1)
        model = self.llm_engine.get(lora_request)
        return [
            RequestOutput([self._complete(model, prompt["prompt_token_ids"], how)])
            for prompt, how in zip(prompts, params, strict=True)
        ]

    def _complete(self, model: Any, prompt: list[int], how: SamplingParams) -> Completion:
        noise = torch.Generator().manual_seed(how.seed)
        tokens: list[int] = []
        known: list[dict[int, Logprob]] = []
        while len(tokens) < how.max_tokens and len(prompt) + len(tokens) < self._longest:
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            logprob_V = torch.log_softmax(logits, -1)
            token = int(torch.multinomial(logprob_V.exp(), 1, generator=noise))
            tokens.append(token)
            known.append({token: Logprob(float(logprob_V[token]))})
            if token in how.stop_token_ids:
                return Completion(tokens, known, "stop")
        return Completion(tokens, known, "length")


def install(patch: pytest.MonkeyPatch) -> None:
    """Put it where `import vllm` finds it."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.inputs", "vllm.lora", "vllm.lora.request")}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        patch.setitem(sys.modules, name, module)
    vars(modules["vllm"]).update(LLM=LLM, SamplingParams=SamplingParams, __version__="0")
    vars(modules["vllm.inputs"]).update(TokensPrompt=dict)
    vars(modules["vllm.lora.request"]).update(LoRARequest=LoRARequest)
