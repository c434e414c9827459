"""Image classification: one class for each image, or several. An image is opened when its batch is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.images import image_folder
from layerlens.data.pixels import SUFFIXES
from layerlens.data.table import IMAGES, Table
from layerlens.data.values import class_names
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.class_targets import (
    bits_of_classes,
    classes_loss,
    finish_with,
    label_columns,
    label_tensor,
    label_values,
    read_classes,
    record_class_targets,
)
from layerlens.tasks.metrics import Metrics, Record, finish_classes, joined
from layerlens.tasks.task import Claim, Task

if TYPE_CHECKING:
    import torch


def read(table: Table, config: DataConfig) -> Dataset:
    """Images (paths or encoded bytes) and their classes."""
    labels, names = read_classes(table, label_columns(table, config))
    return Dataset({"image": table.images(config)}, labels, names, table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Images (encoded, or names of image files), and their classes."""
    labels = bits_of_classes(table, config) or [table.labelled(config) or "", *table.repeating(config)]
    label = next(filter(None, labels), None)
    if label is None or not has_images(table, config):
        return None
    return Claim(2, f"images in column {table.named(config.image_column, IMAGES)!r} and classes in {label!r}")


def has_images(table: Table, config: DataConfig) -> bool:
    """Whether the rows have a column of images: encoded, or names of image files."""
    image = table.named(config.image_column, IMAGES)
    return image is not None and any(
        isinstance(value, (bytes, dict)) or Path(str(value)).suffix.lower() in SUFFIXES or hasattr(value, "shape")
        for value in table.peek(image)
        if value is not None
    )


def read_folder(folder: Path, config: DataConfig) -> Dataset:
    """The images below ``folder``; the sub-folder that an image is in is its class."""
    images, labels, reading = image_folder(folder, config.max_image_pixels)
    names = class_names(labels)
    index = {name: position for position, name in enumerate(names)}
    return Dataset({"image": images}, tuple(index[label] for label in labels), names, folder.name, reading=reading)


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images that are still encoded, with their classes."""
    return with_images(pretrained, dataset, TASK.name, label_values(dataset))


def with_images(pretrained: PretrainedModel, dataset: Dataset, task: str, labels: Sequence[Any]) -> list[Features]:
    """Images that are still encoded, with their labels.

    Raises:
        ConfigurationError: the model has no image processor.
    """
    if pretrained.images is None:
        raise ConfigurationError(
            f"model.factory: {task} needs a way to turn images into the model's inputs; return (model, transform) from "
            "the factory, with transform: PIL image -> tensor [channels, height, width], or list of images -> batch"
        )
    images = dataset.columns["image"]
    return [{"image": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, torch.Tensor]:
    """Pixels [b, channels, height, width] by the model's own argument; classes int64 [b], or float32 [b, classes]."""
    images = pretrained.images
    assert images is not None
    return images.inputs(pretrained.model, [row["image"] for row in rows]), label_tensor(rows)


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Top-1 and top-5 accuracy beside the others: how many classes score higher than the right one."""
    rank = joined(records, "rank")
    return {"top1": float((rank < 1).mean()), "top5": float((rank < 5).mean()), **finish_classes(records, labels)}


TASK = Task(
    name="image-classification",
    description="one class for each image, or several (multi-label)",
    inputs="image",
    read=read,
    claim=claim,
    read_folder=read_folder,
    of_classes=lambda dataset: dataset,
    encode=encode,
    collate=collate,
    loss=classes_loss,
    metrics=Metrics(record_class_targets, finish_with(finish), ("f1_micro", "top1")),
    auto_class="AutoModelForImageClassification",
    class_endings=("ForImageClassificationWithTeacher",),
    new_head=True,
    classes=True,
)
