"""What users would write instead: transformers' Trainer and PEFT under DeepSpeed, with nothing of ours but the rows.

RANK=… python benchmarks/bare_trainer.py <phase folder>/job.json <file for the times>      (started by train.py)
"""

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from phased_cpt.data.index import open_blocks
from phased_cpt.data.mixing import training_order
from phased_cpt.evals.rows import Rows
from phased_cpt.job import Job


class Clock(TrainerCallback):
    """When each step began and ended."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, *arguments, **others) -> None:
        self.begun.append(time.time())

    def on_step_end(self, *arguments, **others) -> None:
        self.ended.append(time.time())


def main(job: Job, times: Path) -> None:
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    phase = job.phase_plan()
    training, batch, lora = phase.settings.training, phase.batch, phase.settings.lora
    blocks = open_blocks(Path(job.train))
    order = training_order(len(blocks), phase.steps * batch.rows, None, *phase.data_seed)
    arguments = TrainingArguments(
        output_dir=str(times.parent / "bare"), deepspeed=job.deepspeed, max_steps=phase.steps,
        per_device_train_batch_size=batch.micro_batch_size, gradient_accumulation_steps=batch.accumulation,
        train_sampling_strategy="sequential", remove_unused_columns=False, learning_rate=training.learning_rate,
        weight_decay=training.weight_decay, optim=training.optimizer, lr_scheduler_type="cosine",
        bf16=phase.model.precision == "bf16", activation_checkpointing=training.gradient_checkpointing,
        logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() else "gloo",
    )  # fmt: skip
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[phase.model.precision]
    model = AutoModelForCausalLM.from_pretrained(job.start.base, dtype=dtype)
    model.config.use_cache = False
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    clock = Clock()
    rows = torch.utils.data.Subset(Rows(blocks), order.tolist())
    trainer = Trainer(get_peft_model(model, config), arguments, train_dataset=rows, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if os.environ["RANK"] == "0":
        loss = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        times.write_text(json.dumps({"begun": clock.begun, "ended": clock.ended, "loss": loss}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])), Path(sys.argv[2]))
