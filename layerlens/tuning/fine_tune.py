"""What a fine-tune is: its job, the hooks around its steps, how many steps it has, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerlens.config import TrainingConfig
from layerlens.exceptions import ConfigurationError
from layerlens.tuning.reporting import Reports
from layerlens.tuning.samples import TrainingData
from layerlens.utils.launch import is_main_process
from layerlens.utils.progress import Progress

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
Loss = Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor]
"""(model, batch) -> the mean loss of the batch, in place of the model's own."""


class TrainingHook:
    """What a method does around every optimiser step; overwrite what is needed.

    ``step`` counts finished optimiser steps: 0 in ``before_step`` of the first one, 1 in its ``after_step``.
    """

    def before_training(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Once, after a checkpoint has been loaded, if there is one."""

    def before_step(self, model: torch.nn.Module, step: int) -> None:
        """Gradients are there, accumulated and scaled to ``max_grad_norm``; the optimiser has not stepped."""

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """The optimiser has stepped; gradients are still there."""

    def settled(self, step: int) -> bool:
        """Whether the weights after ``step`` steps may be kept as the best; not while a method changes its size."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on; saved in every checkpoint with ``torch.save``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""


@dataclass(frozen=True)
class FineTune:
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
    tell: Callable[[str], None] = lambda line: None
    reports: Reports = field(default_factory=Reports)


@dataclass(frozen=True)
class TrainingResult:
    """A finished fine-tune.

    Args:
        metrics: of the weights that the model has now: "loss" and the task's own; empty without evaluation samples.
        evaluations: of every evaluation: "step" and its metrics.
        losses: mean training loss of every optimiser step.
        best_step: the step whose weights the model has now.
        steps: optimiser steps that were taken.
        trained_parameters: how many parameters were trained.
        tokens: unpadded tokens (samples, where there are no tokens) that were trained on, of all processes.
        train_seconds: time in training steps; ``wall_seconds`` has evaluation and checkpoints as well. Both add up
            over runs that were interrupted.
        tokens_per_second: tokens / train_seconds.
        peak_memory_gb, peak_memory_of: peak of this process in GB (1e9 bytes), and what it is the peak of.
        resumed_from: step of the checkpoint that the last run went on from.
        processes: how many processes trained.
        stored_prefix: where activations were stored: "blocks_skipped", "blocks" of the model, and "bytes"; else None.
    """

    metrics: dict[str, float]
    evaluations: tuple[dict[str, float], ...]
    losses: tuple[float, ...]
    best_step: int
    steps: int
    trained_parameters: int
    tokens: int
    train_seconds: float
    wall_seconds: float
    tokens_per_second: float
    peak_memory_gb: float
    peak_memory_of: str
    resumed_from: int | None
    processes: int
    stopped_early: bool = False
    stored_prefix: dict[str, int] | None = None
    job: dict[str, Any] = field(default_factory=dict)


def processes() -> tuple[int, bool]:
    """(number of processes, whether this is the first one) of a run that torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", 1)), is_main_process()


def training_arguments(job: FineTune) -> TrainingArguments:
    """Trainer's own settings; evaluating and saving stay with us, and so does logging where nobody asked for reports.

    Raises:
        ConfigurationError: the device or the model cannot do what the configuration asks for.
    """
    from transformers import TrainingArguments

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
    everywhere = config.gradient_checkpointing is True
    if everywhere and not hasattr(job.model, "gradient_checkpointing_enable"):
        raise ConfigurationError(
            f"training.gradient_checkpointing: a {type(job.model).__name__} does not support it (transformers' models "
            "do)"
        )
    try:
        arguments = TrainingArguments(
            output_dir=str(job.checkpoints.parent if job.reports.names else job.checkpoints),  # callbacks write there
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
            gradient_checkpointing=everywhere,
            gradient_checkpointing_kwargs={"use_reentrant": False} if everywhere else None,
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
            logging_strategy="steps" if job.reports.names else "no",
            logging_steps=job.reports.every,
            logging_nan_inf_filter=False,
            run_name=job.reports.run_name,
            project=job.reports.project,
            report_to=[],
            disable_tqdm=True,
        )
    except ValueError as error:
        raise ConfigurationError(f"training: {' '.join(str(error).split())}") from error
    arguments.report_to = []  # inside a Kubeflow job transformers adds one of its own accord
    return arguments
