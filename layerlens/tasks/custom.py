"""Samples of the user's own data set, and the user's own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from layerlens.config import DataConfig
from layerlens.data import Dataset
from layerlens.exceptions import DataError, ProfilingError
from layerlens.integrations.factories import first_argument
from layerlens.integrations.transformers import PretrainedModel
from layerlens.tasks.batches import Batch, Features, Inputs
from layerlens.tasks.losses import Loss


def encode_own(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Every sample's inputs as tensors by argument of the model, read once."""
    argument = first_argument(pretrained.model)
    found = []
    for number, sample in enumerate(dataset.columns["sample"]):
        inputs, labels = sample.read()
        named = dict(inputs) if isinstance(inputs, Mapping) else {argument: inputs}
        try:
            found.append({name: torch.as_tensor(value) for name, value in named.items()} | {"labels": labels})
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"data.source: sample {number} has an input that is no tensor: {error}") from error
    return found


def collate_own(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Inputs of one shape, and targets as torch's ``default_collate`` joins them."""
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}
    return inputs, default_collate([row["labels"] for row in rows])


def own_loss(function: Callable[[Any, Any], torch.Tensor], name: str) -> Loss:
    """The user's (output, targets) -> losses as a task's loss, checked.

    Raises:
        ProfilingError: when called: what came back is not one loss for each sample.
    """

    def loss(output: Any, batch: Batch) -> torch.Tensor:
        losses__b = function(output, batch.labels)
        n = len(batch.index)
        if not isinstance(losses__b, torch.Tensor) or losses__b.shape != (n,):
            got = list(losses__b.shape) if isinstance(losses__b, torch.Tensor) else type(losses__b).__name__
            raise ProfilingError(
                f"model.loss: {name} must return the loss of each sample, a tensor [{n}], got {got}; do not reduce "
                "over the batch (reduction='none')"
            )
        return losses__b

    return loss
