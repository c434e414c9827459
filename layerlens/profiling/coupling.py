"""Whether the loss of a sample depends on the others in its batch: tried on one batch before anything is measured.

Statistics of single samples take it that it does not. In-batch negatives, a batch norm that takes the batch's own
statistics, or a loss that is divided by what the batch has in all make it depend on them: the same samples would then
have other statistics with another ``data.batch_size``. Some of the samples alone must have the losses that they have
together: every second one, the first half, and the first one by itself (what compares neighbours shows in one of them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerlens.integrations.torch_modules import frozen_without_dropout
from layerlens.integrations.transformers import without_cache
from layerlens.integrations.weight_matrices import uncompiled
from layerlens.tasks import Batch, Loss
from layerlens.tasks.losses import BatchLoss

TOLERANCE, HALF_PRECISION = 1e-3, 5e-2
"""Largest difference of two losses that are the same, relative to the batch's mean: sums of 10⁴ products of float32 in
another order differ by 1e-5 (float16 and bfloat16: 1e-2), losses that depend on other samples by what these change."""


@dataclass(frozen=True)
class Coupling:
    """What one batch has shown.

    Args:
        said: how the loss depends on other samples, as the end of a sentence; "" where it does not.
        random: whether it differs from pass to pass, so that nothing can be compared.
    """

    said: str = ""
    random: bool = False


def coupling(model: torch.nn.Module, batches: Sequence[Batch], loss: Loss) -> Coupling:
    """Try the loss on the first batch that has two samples; nothing is known where all have one."""
    batch = next((one for one in batches if len(one.index) > 1), None)
    if batch is None:
        return Coupling()
    model = uncompiled(model)
    rows = len(batch.index) * batch.rows
    if any(not isinstance(x, torch.Tensor) or x.dim() < 1 or len(x) != rows for x in batch.inputs.values()):
        return Coupling()  # inputs without an axis of samples: nothing can be taken apart
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    tolerance = TOLERANCE if exact else HALF_PRECISION
    n = len(batch.index)
    parts = {"every second of them": range(0, n, 2), "the first half of them": range((n + 1) // 2), "the first": [0]}
    with frozen_without_dropout(model, checkpointing=False), without_cache(model), torch.no_grad():

        def losses(part: Batch) -> torch.Tensor:
            found: torch.Tensor = loss(model(**part.inputs), part)
            return found.detach().double().cpu()

        whole = losses(batch)
        if not torch.isfinite(whole).all():
            return Coupling()  # which measuring refuses by sample
        near = tolerance * float(whole.abs().mean())
        for what, places in parts.items():
            order = torch.tensor(list(places))
            try:
                alone = losses(batch.taken(order))
            except (RuntimeError, ValueError, IndexError):  # it takes no fewer samples: another part may tell
                continue
            if alone.shape == whole[order].shape and not _alike(whole[order], alone, near):
                if not _alike(whole, losses(batch), near):
                    return Coupling(random=True)
                mean = f"{float(whole[order].mean()):.4g} among {n} and {float(alone.mean()):.4g} without the others"
                return Coupling(f"of a batch of {n} samples, {what} had a mean loss of {mean}")
    return Coupling()


def _alike(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool(((one - other).abs() <= tolerance + 1e-12).all())


class Units(Sequence[Batch]):
    """Batches, each counting as one sample; they are made when they are asked for, as the batches are."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.plan: list[list[int]] = [[number] for number in range(len(batches))]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        place = range(len(self))[number]
        return replace(self.batches[place], index=torch.tensor([place]))

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))


def of_batches(loss: Loss, name: str) -> BatchLoss:
    """The mean loss of a batch's samples, for ``Units``."""

    def of_model(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        n = len(next(iter(batch.inputs.values()))) // batch.rows
        return loss(model(**batch.inputs), replace(batch, index=torch.arange(n))).mean()

    return BatchLoss(of_model, name)
