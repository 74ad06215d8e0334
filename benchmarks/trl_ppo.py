"""TRL's side of ppo.py, run by the interpreter of an environment that has TRL 1.12 and not us.

    python trl_ppo.py JOB.json

The last line is one JSON object: seconds of each round, the episodes of each, and the peak of memory.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl_train import peak_memory


class Clock(TrainerCallback):
    """When each round ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def settings(job: dict[str, Any], folder: Path) -> PPOConfig:
    """One minibatch of all episodes, as ours."""
    return PPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=job["episodes"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=job["epochs"],
        total_episodes=job["episodes"] * job["rounds"],
        local_rollout_forward_batch_size=job["episodes"],
        response_length=job["new_tokens"],
        temperature=1.0,
        kl_coef=job["kl"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=job["bf16"],
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        logging_steps=10**9,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def adapter(job: dict[str, Any], task: str) -> LoraConfig | None:
    """The same as ours; peft keeps its weights in fp32."""
    lora = job["lora"]
    if not lora:
        return None
    return LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=0.0, target_modules=lora["targets"], task_type=task
    )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    folder = Path(sys.argv[1]).parent
    torch.set_num_threads(job["threads"])
    disable_progress_bars()
    dtype = torch.bfloat16 if job["bf16"] and job["lora"] else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")

    def scoring() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=dtype, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    value = scoring()
    if job["lora"]:
        value = get_peft_model(value, adapter(job, "SEQ_CLS"))
    clock = Clock()
    asked = [ids for ids in job["prompts"] for _ in range(job["samples"])]
    trainer = PPOTrainer(
        settings(job, folder),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype),
        ref_model=None,
        reward_model=scoring(),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": asked}),
        eval_dataset=Dataset.from_dict({"input_ids": asked[:1]}),
        peft_config=adapter(job, "CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    seconds = [end - start for start, end in pairwise(clock.ends)]
    print(json.dumps({"seconds": seconds, "work": [job["episodes"]] * job["rounds"], "peak": peak_memory()}))


if __name__ == "__main__":
    main()
