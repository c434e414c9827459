"""One fine-tuning job, and how transformers' Trainer is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from layerlens.config import TrainingConfig
from layerlens.exceptions import ConfigurationError
from layerlens.tuning.samples import TrainingData
from layerlens.tuning.training import Loss, TrainingHook
from layerlens.utils.progress import Progress

OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Job:
    """What ``fine_tune`` was asked for; ``names`` are the parameters that train."""

    model: torch.nn.Module
    data: TrainingData
    config: TrainingConfig
    task: str
    checkpoints: Path
    seed: int
    names: tuple[str, ...]
    loss: Loss | None
    hooks: tuple[TrainingHook, ...]
    identity: dict[str, Any]
    progress: Progress


def training_arguments(job: Job) -> TrainingArguments:
    """Trainer's own settings; evaluating, saving and logging stay with us.

    Raises:
        ConfigurationError: the device or the model cannot do what the configuration asks for.
    """
    config, cpu = job.config, not torch.cuda.is_available()
    if config.precision == "float16" and cpu:
        raise ConfigurationError(
            "training.precision: float16 needs a GPU (its loss scaling has none on a CPU); use bfloat16 or float32"
        )
    narrow = [name for name in job.names if job.model.get_parameter(name).dtype == torch.float16]
    if narrow:
        raise ConfigurationError(
            f"model.dtype: {narrow[0]} would be trained in float16, where AdamW's averages underflow; use float32 or "
            "bfloat16 (LoRA, adapters and prefixes are float32 in a float16 model, a task head is not)"
        )
    if config.gradient_checkpointing and not hasattr(job.model, "gradient_checkpointing_enable"):
        raise ConfigurationError(
            f"training.gradient_checkpointing: a {type(job.model).__name__} cannot (transformers' models can)"
        )
    try:
        return TrainingArguments(
            output_dir=str(job.checkpoints),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            learning_rate=config.learning_rate,
            lr_scheduler_type=SCHEDULES[config.schedule],
            warmup_steps=config.warmup_ratio,
            optim=OPTIMIZERS[config.optimizer],
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
            bf16=config.precision == "bfloat16",
            fp16=config.precision == "float16",
            seed=job.seed,
            use_cpu=cpu,
            ddp_backend="gloo" if cpu and job.identity["processes"] > 1 else None,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=not cpu,
            remove_unused_columns=False,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
        )
    except ValueError as error:
        raise ConfigurationError(f"training: {' '.join(str(error).split())}") from error
