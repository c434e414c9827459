"""Images as pixels; they are opened when their batch is asked for, so a data set of any size fits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerlens.config import DataConfig
from layerlens.data import Dataset
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.transformers import PretrainedModel
from layerlens.tasks.batches import Features, Inputs


def encode_images(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images that are still encoded, with their classes.

    Raises:
        ConfigurationError: the model has no image processor.
    """
    if pretrained.images is None:
        raise ConfigurationError(
            "model.factory: image-classification needs to know how images become the model's inputs; return (model, "
            "transform) from the factory, with transform: list of PIL images -> tensor [batch, channels, height, width]"
        )
    return [
        {"image": image, "labels": label} for image, label in zip(dataset.columns["image"], dataset.labels, strict=True)
    ]


def collate_images(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, torch.Tensor]:
    """Pixels [b, channels, height, width] under the model's own argument, and classes int64 [b]."""
    images = pretrained.images
    assert images is not None
    pixels = images.transform([row["image"].open(images.mode) for row in rows])
    dtype = next(pretrained.model.parameters()).dtype
    return {images.argument: pixels.to(dtype)}, torch.tensor([row["labels"] for row in rows])
