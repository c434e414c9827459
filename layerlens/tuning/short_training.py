"""Short trainings: one loop and one warm-up schedule for proxies, the proxy check and the study's stacked arms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

MAX_GRADIENT_NORM = 1.0
WARMUP_SHARE = 0.1
FP16_LOSS_SCALE = 2.0**10
"""float16 loses gradients below 6e-8; a power of two scales them without rounding."""

Loss = Callable[[torch.nn.Module], torch.Tensor]
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
    losses: Sequence[Loss],
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
