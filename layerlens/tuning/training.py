"""Fine-tuning any prepared model: one loop, one data order and one kind of checkpoint for every method.

``fine_tune`` trains whatever requires gradients. What a method does beside gradient steps (AdaLoRA's allocator,
meta-learned selection variables) it does in a ``TrainingHook``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from layerlens.config import TrainingConfig
from layerlens.exceptions import TrainingError
from layerlens.tasks import task_metrics
from layerlens.tuning.checkpoints import check_job, last_checkpoint
from layerlens.tuning.samples import TrainingData
from layerlens.utils.atomic import check_writable
from layerlens.utils.launch import is_main_process
from layerlens.utils.progress import Progress, silent

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
    job: dict[str, Any] = field(default_factory=dict)


def fine_tune(
    model: torch.nn.Module,
    data: TrainingData,
    config: TrainingConfig,
    *,
    task: str,
    checkpoints: Path,
    seed: int = 0,
    loss: Loss | None = None,
    hooks: Sequence[TrainingHook] = (),
    identity: Mapping[str, Any] | None = None,
    restart: bool = False,
    progress: Progress = silent,
) -> TrainingResult:
    """Train every parameter of ``model`` that requires gradients, in place, by transformers' Trainer.

    Goes on from the last checkpoint below ``checkpoints``; a run that was killed and goes on ends with the same bits as
    one that was not (for the same number of processes and threads). Under torchrun or accelerate every process calls
    this with the same arguments. Checkpoints stay there when it is done.

    Args:
        model: a prepared transformers or PEFT model; its output has ``loss`` (unless ``loss`` is given) and what the
            metrics of ``task`` need.
        data: samples for training and evaluation; without evaluation samples nothing is evaluated.
        config: how to train.
        task: a name in ``layerlens.registry.TASKS``.
        checkpoints: directory that belongs to this job.
        seed: of data order and dropout where ``config.seed`` is None.
        loss: mean loss of a batch, if not the model's own.
        hooks: called around every optimiser step, in this order.
        identity: what else tells this job from others (a manifest's fingerprint, a method's name), as JSON values.
        restart: remove the checkpoints that are there.
        progress: told of the optimiser steps.

    Raises:
        TrainingError: a loss or a gradient is not finite (the message names step and samples; the last checkpoint
            stays), nothing trains, no samples, or the checkpoints belong to another job.
        ConfigurationError: the precision is not to be had on this device, or the metric is unknown.
        OutputError: a checkpoint cannot be written, or the disk is full; the last whole one stays.
    """
    from layerlens.tuning.trainer import Job, run

    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not names:
        raise TrainingError("no parameter of the model requires a gradient, so there is nothing to train")
    if not len(data.train):
        raise TrainingError("there are no training samples")
    checkpoints = Path(checkpoints).absolute()
    world, main = processes()
    job = {
        "config": config.model_dump(mode="json"),
        "seed": seed if config.seed is None else config.seed,
        "task": task,
        "data": [data.fingerprint, len(data.train), len(data.evaluation)],
        "trained": [len(names), sum(model.get_parameter(name).numel() for name in names)],
        "processes": world,
        **(identity or {}),
    }
    task_metrics(task)
    if main:
        check_writable(checkpoints)
        if restart:
            shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
        check_job(checkpoints, job)
    return run(
        Job(model, data, config, task, checkpoints, int(job["seed"]), names, loss, tuple(hooks), job, progress),
        last_checkpoint,
    )


def total_steps(samples: int, config: TrainingConfig, processes: int = 1) -> int:
    """Optimiser steps that ``fine_tune`` will take on so many training samples."""
    if config.max_steps is not None:
        return config.max_steps
    return math.ceil(config.epochs * steps_per_epoch(samples, config, processes))


def steps_per_epoch(samples: int, config: TrainingConfig, processes: int = 1) -> int:
    """Optimiser steps in one pass over so many samples."""
    batches = math.ceil(samples / (config.batch_size * processes))
    return max(1, math.ceil(batches / config.gradient_accumulation))


def processes() -> tuple[int, bool]:
    """(number of processes, whether this is the first one) of a run that torchrun or accelerate started."""
    import os

    return int(os.environ.get("WORLD_SIZE", 1)), is_main_process()
