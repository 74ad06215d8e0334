"""TRL's side of benchmarks/train.py and curves.py, run by the interpreter of an environment that has TRL and not us.

    python trl_train.py JOB.json

The job names the stage, the folder of the model, the precision, the adapter to start from (a folder of peft's, or null:
a new one), the token ids and the steps; `in_order` keeps the ids in their order. An adapter for reward holds the score
head too, which then has a bias: ours has one, TRL's own has none. The last line is one JSON object: what each step took
and trained on, the losses, and the peak of memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds and losses of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class Counting:
    """A collator that counts the tokens (or, of pairs, half of the rows) that it hands out."""

    def __init__(self, inner: Any, unit: str) -> None:
        self.inner, self.unit = inner, unit
        self.work: list[int] = []

    def __call__(self, examples: Any) -> Any:
        batch = self.inner(examples)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        self.work.append(len(ids) // 2 if self.unit == "pairs" else int(ids.numel() if mask is None else mask.sum()))
        return batch


def settings(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What both stages share: the same optimizer and schedule as ours, and nothing that costs without need."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": job["bf16"],
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def peak_memory() -> int:
    """Bytes that this process held at most; `ru_maxrss` alone also knows what the process held that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text("ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    folder = Path(sys.argv[1]).parent
    torch.set_num_threads(job["threads"])
    disable_progress_bars()
    lora = job["lora"]
    dtype = torch.bfloat16 if job["bf16"] and lora else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    clock = Clock()
    config = None
    if lora and not job["adapter"]:
        config = LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=0.0,
            target_modules=lora["targets"],
            task_type="CAUSAL_LM" if job["stage"] == "sft" else "SEQ_CLS",
            modules_to_save=None if job["stage"] == "sft" else ["score"],
        )
    common = settings(job, folder)
    if job["in_order"]:
        common["train_sampling_strategy"] = "sequential"
    if job["stage"] == "sft":
        model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=dtype, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
    if job["adapter"]:
        if job["stage"] == "reward":
            model.score = torch.nn.Linear(model.score.in_features, 1)
        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    if job["stage"] == "sft":
        packed = {"packing": True, "packing_strategy": job["packing"]} if job["packing"] else {}
        trainer: Any = SFTTrainer(
            model,
            args=SFTConfig(max_length=job["length"], **packed, **common),
            train_dataset=Dataset.from_dict({"input_ids": job["documents"]}),
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[clock],
        )
    else:
        trainer = RewardTrainer(
            model,
            args=RewardConfig(max_length=None, center_rewards_coefficient=job["centring"] or None, **common),
            train_dataset=Dataset.from_dict(job["pairs"]),
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[clock],
        )
    trainer.data_collator = counting = Counting(
        trainer.data_collator, "pairs" if job["stage"] == "reward" else "tokens"
    )
    trainer.train()
    peak = peak_memory()
    print(json.dumps({"seconds": clock.seconds, "work": counting.work, "losses": clock.losses, "peak": peak}))


if __name__ == "__main__":
    main()
