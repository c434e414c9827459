"""The loss of single samples out of a trainer, for statistics by sample (Fisher, noise, NTK), where it has one.

A trainer's loss is of a batch. It has a part for each sample where the mean of the losses of batches of one sample is
the loss of the batch: not with in-batch negatives, and not where a row is packed from several samples. Whether it is so
is computed, on one batch, by the gradients: losses alone can agree by chance (DPO's are all log 2 before training).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.torch_modules import frozen_without_dropout
from layerlens.library.trainers import GivenByTrainer, TrainerBatch

COMPARED_WEIGHTS = 8
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative difference of two gradients that is rounding: sums over padded rows have another order. 0.05 in half
precision, whose eps is 100 times that of these bounds' float32."""


@dataclass(frozen=True)
class SingleLosses:
    """Batches of one sample each, whose mean loss is that of the batches that they are from.

    Args:
        batches: one for each sample.
        loss: (model, one of them) -> scalar.
        by_labels: whether samples weigh as many labels as they have, as in a mean over the tokens of a batch.
    """

    batches: list[TrainerBatch]
    loss: Callable[[torch.nn.Module, TrainerBatch], torch.Tensor]
    by_labels: bool


def single_losses(given: GivenByTrainer, n_samples: int) -> SingleLosses:
    """The first samples of the trainer's batches, each with a loss of its own.

    Args:
        given: of an open trainer.
        n_samples: at most so many.

    Raises:
        ProfilingError: its loss has no part for each sample; says why by the loss's name.
    """
    rows = [row for batch in given.batches for row in batch.rows][:n_samples]
    first = next((list(batch.rows) for batch in given.batches if len(batch.rows) > 1), rows)
    if reason := given.why_not_single or _why_not(given, first):
        raise ProfilingError(
            f"{given.loss_name} has no loss of each sample: {reason}; take statistics of the mean gradient "
            "(the default utility), or a loss of single samples"
        )
    singles = _weighed([given.collate([row]) for row in rows])
    return SingleLosses(singles, given.loss, singles[0].n_items is not None)


def _why_not(given: GivenByTrainer, rows: list[Any]) -> str:
    """Why the loss of a batch of these rows is not the mean of the rows' losses; "" where it is."""
    if not rows:
        return "its batches do not come from its data_collator, so they cannot be split into samples"
    if len(rows) == 1:
        return ""  # batches of one sample each: they are what is trained on
    model = given.model
    with frozen_without_dropout(model):
        weights = _some_weights(model)
        for weight in weights:
            weight.requires_grad_(True)
        whole = _gradient(given, weights, [given.collate(rows)])
        singles = _gradient(given, weights, _weighed([given.collate([row]) for row in rows]))
    size = float(whole.norm())
    if size == 0.0:
        return "no gradient reaches the model's weights"
    difference = float((whole - singles).norm()) / size
    if difference <= TOLERANCE.get(given.precision, 0.05):
        return ""
    return (
        f"the mean gradient of {len(rows)} single samples differs from that of their batch by "
        f"{min(difference, 9.99):.0%} (they are compared with each other, or all their tokens have one mean)"
    )


def _weighed(singles: Sequence[TrainerBatch]) -> list[TrainerBatch]:
    """The same where each counts its labels against the mean number of labels: their mean is then one over labels."""
    counts = [single.n_items for single in singles]
    if any(count is None for count in counts):
        return [replace(single, n_items=None) for single in singles]
    mean = sum(counts) / len(counts)
    return [replace(single, n_items=mean) for single in singles]


def _some_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """A few small ones all over the model: norms and biases."""
    able = [weight for weight in model.parameters() if weight.is_floating_point() and weight.numel() > 1]
    small = sorted(range(len(able)), key=lambda position: (able[position].numel(), position))[: 4 * COMPARED_WEIGHTS]
    return [able[position] for position in sorted(small)][:: max(1, len(small) // COMPARED_WEIGHTS)]


def _gradient(
    given: GivenByTrainer, weights: list[torch.nn.Parameter], batches: Sequence[TrainerBatch]
) -> torch.Tensor:
    """Of the mean loss of the batches, in these weights, as one float64 vector."""
    total = torch.zeros(sum(weight.numel() for weight in weights), dtype=torch.float64)
    for batch in batches:
        loss = given.loss(given.model, batch)
        found = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else [None] * len(weights)
        flat = [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]
        total += torch.cat([part.detach().double().cpu().flatten() for part in flat])
    return total / len(batches)
