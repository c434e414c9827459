"""LoRA's first A for a run, where the configuration asks for one that is measured on the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layerlens.models import Choice
from layerlens.tasks import Batch, Loss
from layerlens.tuning.initialization import CalibrationBatch, initial_factors


def measured_factors(
    model: torch.nn.Module, choice: Choice, batches: Sequence[Batch], loss: Loss, fit_head: Callable[[], None]
) -> dict[str, torch.Tensor] | None:
    """A of every LoRA layer by name; None where LoRA begins from PEFT's own.

    Args:
        model: the base model.
        choice: what was chosen.
        batches: the calibration batches.
        loss: loss of every sample.
        fit_head: fits a new task head; called where gradients are needed, since those through a random head say
            nothing.
    """
    if not choice.lora.is_measured or not choice.lora_options:
        return None
    if choice.lora.initialization == "gradient_svd":
        fit_head()

    def with_loss(batch: Batch) -> CalibrationBatch:
        return CalibrationBatch(batch.inputs, lambda output: loss(output, batch).sum())

    return initial_factors(model, choice, [with_loss(batch) for batch in batches])
