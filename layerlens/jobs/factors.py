"""LoRA's first A for a run, where the configuration asks for one that is measured on the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layerlens.models import Manifest
from layerlens.tasks import Batch, Loss
from layerlens.tuning.initialization import CalibrationBatch, initial_factors


def measured_factors(
    model: torch.nn.Module, manifest: Manifest, batches: Sequence[Batch], loss: Loss, fit_head: Callable[[], None]
) -> dict[str, torch.Tensor] | None:
    """A of every LoRA layer by name; None where the manifest begins from PEFT's own.

    Args:
        model: the base model.
        manifest: what was chosen.
        batches: the calibration batches.
        loss: loss of every sample.
        fit_head: fits a new task head; called where gradients are needed, since those through a random head say
            nothing.
    """
    kind = manifest.lora["initialization"]
    if kind == "default" or not any(row.method == "lora" for row in manifest.allocations):
        return None
    if kind == "gradient_svd":
        fit_head()

    def with_loss(batch: Batch) -> CalibrationBatch:
        return CalibrationBatch(batch.inputs, lambda output: loss(output, batch).sum())

    return initial_factors(model, manifest, [with_loss(batch) for batch in batches])
