"""The plan in the words of the Trainer: the only file that knows the names of its arguments."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from phased_cpt.config.allowed import nearest
from phased_cpt.errors import InputError
from phased_cpt.plan import PhasePlan

A_WEEK = 7 * 24 * 3600  # seconds that a collective may wait: rank 0 may merge, or a machine swap


def training_arguments(phase: PhasePlan, deepspeed: dict[str, Any], folder: Path) -> TrainingArguments:
    """How one phase is trained."""
    training, batch, steps = phase.settings.training, phase.batch, phase.steps
    assert batch is not None and steps is not None
    require_optimizer(training.optimizer)
    return TrainingArguments(
        output_dir=str(folder),
        deepspeed=deepspeed,
        max_steps=steps,
        per_device_train_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.accumulation,
        train_sampling_strategy="sequential",  # the rows come in our order
        remove_unused_columns=False,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm or 0.0,
        optim=training.optimizer,
        bf16=phase.model.precision == "bf16",
        fp16=phase.model.precision == "fp16",
        activation_checkpointing=training.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        average_tokens_across_devices=True,  # else ranks with few labels weigh as much: 1.5 × was measured
        logging_steps=1,
        logging_nan_inf_filter=False,  # which would hide what is not finite
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        seed=phase.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() else "gloo",
        ddp_timeout=A_WEEK,
    )


def require_optimizer(name: str) -> None:
    known = [str(each.value) for each in OptimizerNames]
    if name not in known:
        raise InputError(f"training.optimizer: the Trainer knows no {name!r}{nearest(name, known)}")
