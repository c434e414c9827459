"""A few training steps of what was injected, on a model that shares its frozen weights with the one it came from."""

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


def train_steps(
    model: torch.nn.Module,
    losses: Sequence[Loss],
    *,
    learning_rate: float,
    decay: bool = False,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """One AdamW step for each loss, of the parameters that require a gradient; dropout is off.

    Args:
        model: with something trainable.
        losses: each gives the losses of one batch, whose mean is minimised.
        learning_rate: constant unless ``decay``, without weight decay; gradients are clipped to norm 1.
        decay: warm up over a tenth of the steps, then fall linearly towards 0, as a fine-tune would.
        after_step: called after every step.
    """
    model.eval()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    scale = FP16_LOSS_SCALE if half else 1.0
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    for step, loss in enumerate(losses):
        if decay:
            optimizer.param_groups[0]["lr"] = learning_rate * _schedule(step, len(losses))
        optimizer.zero_grad()
        (loss(model).mean() * scale).backward()
        for parameter in trainable:
            if parameter.grad is not None:
                parameter.grad /= scale
        torch.nn.utils.clip_grad_norm_(trainable, MAX_GRADIENT_NORM)
        optimizer.step()
        after_step()


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate in ``step``, counted from 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup + 1)
