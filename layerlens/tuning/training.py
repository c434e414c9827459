"""Fine-tuning any prepared model: one loop, one data order and one kind of checkpoint for every method.

``fine_tune`` trains whatever requires gradients. What a method does beside gradient steps (AdaLoRA's allocator,
meta-learned selection variables) it does in a ``TrainingHook``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layerlens.config import TrackingConfig, TrainingConfig
from layerlens.config.training import REPORTS
from layerlens.exceptions import TrainingError
from layerlens.tasks import task_metrics
from layerlens.tuning.checkpoints import check_job, last_checkpoint, remove_checkpoints
from layerlens.tuning.fine_tune import FineTune, Loss, TrainingHook, TrainingResult, processes
from layerlens.tuning.reporting import reports_of
from layerlens.tuning.samples import TrainingData
from layerlens.utils.atomic import check_writable
from layerlens.utils.progress import Progress, silent


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
    tell: Callable[[str], None] = lambda line: None,
    tracking: TrackingConfig | None = None,
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
        progress: reports the optimiser steps.
        tell: called with each line that the user should know.
        tracking: experiment and name of the run, where ``config.report_to`` names somebody.

    Raises:
        TrainingError: a loss or a gradient is not finite (the message names step and samples; the last checkpoint
            stays), nothing trains, no samples, or the checkpoints belong to another job.
        ConfigurationError: the precision is not to be had on this device, or the metric is unknown.
        OutputError: a checkpoint cannot be written, or the disk is full; the last whole one stays.
        TrackingError: whom ``config.report_to`` names cannot be reached; no step has been taken.
    """
    from layerlens.tuning.trainer import run

    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not names:
        raise TrainingError("no parameter of the model requires a gradient, so there is nothing to train")
    if not len(data.train):
        raise TrainingError("there are no training samples")
    checkpoints = Path(checkpoints).absolute()
    world, main = processes()
    job = {
        "config": config.model_dump(mode="json", exclude=REPORTS),
        "seed": seed if config.seed is None else config.seed,
        "task": task,
        "data": [data.fingerprint, len(data.train), len(data.evaluation)],
        "trained": [len(names), sum(model.get_parameter(name).numel() for name in names)],
        "processes": world,
        **(identity or {}),
    }
    task_metrics(task)
    reports = reports_of(config, tracking)
    if main:
        check_writable(checkpoints)
        if restart:
            remove_checkpoints(checkpoints)
        checkpoints.mkdir(parents=True, exist_ok=True)
        check_job(checkpoints, job)
    return run(
        FineTune(
            model,
            data,
            config,
            task,
            checkpoints,
            int(job["seed"]),
            names,
            loss,
            tuple(hooks),
            job,
            progress,
            tell,
            reports,
        ),
        last_checkpoint,
    )
