"""Object detection: images in the detector's square input, boxes, and the detector's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerlens.config import DataConfig
from layerlens.data import Dataset
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.transformers import PretrainedModel
from layerlens.integrations.ultralytics_loss import detection_targets, sample_losses
from layerlens.tasks.batches import Batch, Features, Inputs


def encode_objects(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images that are still encoded, with their objects.

    Raises:
        ConfigurationError: the model is no detector of ultralytics.
    """
    if pretrained.images is None or not pretrained.path.startswith("ultralytics:"):
        raise ConfigurationError("model.name_or_path: object-detection takes ultralytics:WEIGHTS.pt")
    images = dataset.columns["image"]
    return [{"image": image, "labels": found} for image, found in zip(images, dataset.labels, strict=True)]


def collate_objects(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Pixels [b, 3, side, side] as argument ``x``, and ``DetectionTargets``."""
    images = pretrained.images
    assert images is not None
    opened = [row["image"].open(images.mode) for row in rows]
    pixels = images.transform(opened)
    sizes = [image.size for image in opened]
    targets = detection_targets(pretrained, sizes, pixels.shape[-1], [row["labels"] for row in rows])
    return {images.argument: pixels}, targets


def detection_loss(output: Any, batch: Batch) -> torch.Tensor:
    """The detector's own loss of each image, [b]."""
    return sample_losses(output, batch.labels)
