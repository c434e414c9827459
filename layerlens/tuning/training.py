"""Fine-tuning any prepared model: one loop, one data order and one kind of checkpoint for every method.

``fine_tune`` trains whatever requires gradients. What a method does beside gradient steps (AdaLoRA's allocator,
meta-learned selection variables) it does in a ``TrainingHook``.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layerlens.config import TrainingConfig
from layerlens.exceptions import TrainingError
from layerlens.tasks import task_metrics
from layerlens.tuning.checkpoints import check_job, last_checkpoint
from layerlens.tuning.fine_tune import FineTune, Loss, TrainingHook, TrainingResult, processes
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
    from layerlens.tuning.trainer import run

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
        FineTune(model, data, config, task, checkpoints, int(job["seed"]), names, loss, tuple(hooks), job, progress),
        last_checkpoint,
    )


MAX_GRADIENT_NORM = 1.0
WARMUP_SHARE = 0.1
FP16_LOSS_SCALE = 2.0**10
"""float16 loses gradients below 6e-8; a power of two scales them without rounding."""

SampleLosses = Callable[[torch.nn.Module], torch.Tensor]
"""From a model to the losses of some samples, [b]."""


def twin_of(model: torch.nn.Module) -> torch.nn.Module:
    """The same modules and configuration again, on the very same weights and buffers.

    What is injected into the twin, or hooked onto it, is not in ``model``, and nothing large is copied.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate in ``step``, counted from 0: up over a tenth of the steps, then towards 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup + 1)


def run_steps(
    steps: int,
    loss: Callable[[int], torch.Tensor],
    update: Callable[[float], None],
    *,
    decay: bool = True,
    after_backward: Callable[[], None] = lambda: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """The loop: the loss of a step, its gradients, an update.

    Args:
        steps: how many.
        loss: from the number of a step, counted from 0, to a scalar.
        update: moves the parameters and drops their gradients; it is given the share of the peak learning rate.
        decay: warm up and fall as ``schedule`` says; a constant 1 otherwise.
        after_backward: called when the gradients are there.
        after_step: called with the number of the step that was taken.
    """
    for step in range(steps):
        loss(step).backward()
        after_backward()
        update(schedule(step, steps) if decay else 1.0)
        after_step(step)


def train_steps(
    model: torch.nn.Module,
    losses: Sequence[SampleLosses],
    *,
    learning_rate: float,
    decay: bool = False,
) -> None:
    """One AdamW step for each loss, of the parameters that require a gradient; dropout is off.

    Args:
        model: with something trainable.
        losses: each gives the losses of one batch, whose mean is minimised.
        learning_rate: constant unless ``decay``, without weight decay; gradients are clipped to norm 1.
        decay: as in ``run_steps``, as a fine-tune would.
    """
    model.eval()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    scale = FP16_LOSS_SCALE if half else 1.0
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    optimizer.zero_grad()

    def update(share: float) -> None:
        optimizer.param_groups[0]["lr"] = learning_rate * share
        for parameter in trainable:
            if parameter.grad is not None:
                parameter.grad /= scale
        torch.nn.utils.clip_grad_norm_(trainable, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()

    run_steps(len(losses), lambda step: losses[step](model).mean() * scale, update, decay=decay)
