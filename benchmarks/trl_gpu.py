"""TRL's side of gpu.py, run by an interpreter that has TRL: one training for each way in which TRL may be faster.

    python trl_gpu.py JOB.json

Ways: attention by torch's kernels (sdpa), by flash-attn where that is installed, and by FlexAttention; Liger's kernels
where these are installed, alone and with FlexAttention; `torch.compile` where the job asks for it. Where documents vary
in length they are packed ("bfd") or padded. TRL's own fused output matrix is on, as it always is. A step is as much
work as ours; where the card cannot hold it at once it is accumulated over the largest batches that fit, of at most
twice the tokens of an SFT step (the products are large by then).

Ways that change transformers' classes (Liger) come after those that do not. A job names the ways to skip: gpu.py starts
this again where a way has ended the process.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import gpu_side
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl_train import Counting


@dataclass(frozen=True, slots=True)
class Way:
    """Settings of TRL that change how fast it is. packing: rows of several documents, without padding."""

    attention: str
    liger: bool = False
    compiled: bool = False
    packing: bool = False

    @property
    def name(self) -> str:
        """As it is shown."""
        more = [word for word, on in (("liger", self.liger), ("compile", self.compiled), ("bfd", self.packing)) if on]
        return "+".join([self.attention, *more])


def ways(job: dict[str, Any]) -> Iterator[Way]:
    """What there is to try on this machine, the likeliest first."""
    packings = (True, False) if job["vary"] and job["stage"] == "sft" else (False,)
    cuda = job["device"] == "cuda"
    flash = ["flash_attention_2"] if cuda and find_spec("flash_attn") else []
    liger = cuda and find_spec("liger_kernel") is not None
    compiled = (False, True) if job["compile"] else (False,)
    for packing in packings:
        yield from (Way(one, compiled=c, packing=packing) for one in ["sdpa", *flash] for c in compiled)
    for packing in packings:
        if liger:
            yield from (Way(one, liger=True, packing=packing) for one in ["sdpa", *flash])
        if cuda:
            yield Way("flex_attention", liger=liger, packing=packing)


class Steps(TrainerCallback):
    """Tells the clock of each step, and ends the training by it."""

    def __init__(self, clock: gpu_side.Clock) -> None:
        self._clock = clock

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self._clock.step_ended()


def tokenizer() -> PreTrainedTokenizerFast:
    """Never asked for a text; the trainers want the ids of its padding and its end."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def settings(job: dict[str, Any], way: Way, batch: int, items: int, folder: str) -> dict[str, Any]:
    """What both stages share: the same optimizer and schedule as ours, and nothing that costs without need."""
    cpu = job["device"] == "cpu"
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": items // batch,
        "max_steps": job["steps"] + gpu_side.WARM,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": cpu,
        "gradient_checkpointing": job["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if job["checkpointing"] else None,
        "use_liger_kernel": way.liger,
        # It replaces the forward that both trainers need.
        "liger_kernel_config": {"fused_linear_cross_entropy": False} if way.liger else None,
        "torch_compile": way.compiled,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10**9,  # every line of the log waits for the device, and so does the look for NaN
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": not cpu,
        "seed": 0,
    }


def adapter(job: dict[str, Any]) -> LoraConfig | None:
    """The same as ours; peft keeps its weights in fp32."""
    if not job["rank"]:
        return None
    return LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules=job["targets"],
        task_type="CAUSAL_LM" if job["stage"] == "sft" else "SEQ_CLS",
        modules_to_save=None if job["stage"] == "sft" else ["score"],
    )


def trainer_for(job: dict[str, Any], way: Way, batch: int, folder: str, clock: gpu_side.Clock) -> Any:
    """The stage's trainer, with a model of random weights."""
    more = {"processing_class": tokenizer(), "peft_config": adapter(job), "callbacks": [Steps(clock)]}
    common = settings(job, way, batch, items_of(job, way), folder)
    if job["stage"] == "sft":
        model = gpu_side.model_of(LlamaForCausalLM, job, attn_implementation=way.attention)
        packed = {"packing": True, "packing_strategy": "bfd"} if way.packing else {}
        length = job["row_tokens"] if way.packing else job["length"]
        data = Dataset.from_dict({"input_ids": job["documents"]})
        return SFTTrainer(model, args=SFTConfig(max_length=length, **packed, **common), train_dataset=data, **more)
    model = gpu_side.model_of(
        LlamaForSequenceClassification, job, attn_implementation=way.attention, num_labels=1, use_cache=False
    )
    data = Dataset.from_dict(job["pairs"])
    return RewardTrainer(model, args=RewardConfig(max_length=None, **common), train_dataset=data, **more)


def items_of(job: dict[str, Any], way: Way) -> int:
    """Rows (or pairs) of a step."""
    return 1 if way.packing else job["items"]


def batches(job: dict[str, Any], way: Way) -> list[int]:
    """Sizes of a batch that make up a step evenly, the largest first."""
    items = items_of(job, way)
    tokens = job["row_tokens"] if way.packing else job["item_tokens"]
    even = [size for size in range(items, 0, -1) if items % size == 0]
    return [size for size in even if size * tokens <= 2 * job["row_tokens"]] or [1]


def once(job: dict[str, Any], way: Way, batch: int) -> dict[str, Any]:
    """One training; gives what the clock found."""
    with tempfile.TemporaryDirectory() as folder:
        clock = gpu_side.Clock(job)
        trainer = trainer_for(job, way, batch, folder, clock)
        trainer.data_collator = counting = Counting(
            trainer.data_collator, "pairs" if job["stage"] == "reward" else "tokens"
        )
        trainer.train()
    accumulated = items_of(job, way) // batch
    sums = [sum(counting.work[at : at + accumulated]) for at in range(0, len(counting.work), accumulated)]
    return clock.found(sums)


def largest(job: dict[str, Any], way: Way) -> dict[str, Any]:
    """One training with the largest batch that the card holds."""
    for batch in batches(job, way):
        try:
            return {"batch": batch, **once(job, way, batch)}
        except torch.OutOfMemoryError as error:
            told = str(error).splitlines()[0]
        # Only here are the error's frames gone, and with them the last hold on that model.
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() / 1e9 if job["device"] == "cuda" else 0.0
        print(f"{way.name}: a batch of {batch} does not fit ({held:.1f} GB still held): {told}", flush=True)
    return {"error": told}


def tried(job: dict[str, Any], way: Way) -> dict[str, Any]:
    """What a way gives, or its error's last line.

    Raises:
        Exception: that of an error of CUDA itself.
    """
    try:
        return largest(job, way)
    except Exception as error:  # whatever TRL and its kernels may raise: the other ways are tried all the same
        if "CUDA error" in str(error):  # behind which nothing works in this process: gpu.py starts another
            raise
        return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"}


def main() -> None:
    job = gpu_side.read_job()
    disable_progress_bars()
    gpu_side.tell(**gpu_side.machine(job))
    for way in ways(job):
        if way.name in job["skip"]:
            continue
        if time.time() > job["deadline"] - job["seconds"] / 4:
            gpu_side.tell(trial=way.name, error="no time left for it")
            continue
        gpu_side.tell(begun=way.name)
        gpu_side.tell(trial=way.name, **tried(job, way))
        gc.collect()
        if job["device"] == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
