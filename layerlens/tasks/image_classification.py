"""Image classification: one class for each image. An image is opened when its batch is asked for, so any set fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.images import SUFFIXES, image_folder
from layerlens.data.table import IMAGES, Table, class_names
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.losses import classification_loss
from layerlens.tasks.metrics import Metrics, Record, finish_classes, joined, record_classes
from layerlens.tasks.task import Claim, Task

if TYPE_CHECKING:
    import torch


def read(table: Table, config: DataConfig) -> Dataset:
    """Images (paths or encoded bytes) and their classes."""
    labels, names = table.classes(table.find_labels(config))
    return Dataset({"image": table.images(config)}, labels, names, table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Images (encoded, or names of image files), and their classes."""
    image = table.named(config.image_column, IMAGES)
    label = table.labelled(config) or next(iter(table.repeating(config)), None)
    if image is None or label is None:
        return None
    value = table.values(image)[0]
    known = isinstance(value, (bytes, dict)) or Path(str(value)).suffix.lower() in SUFFIXES or hasattr(value, "shape")
    return Claim(2, f"images in column {image!r} and classes in {label!r}") if known else None


def read_folder(folder: Path, config: DataConfig) -> Dataset:
    """The images below ``folder``; the sub-folder that an image is in is its class."""
    images, labels = image_folder(folder, config.max_image_pixels)
    names = class_names(labels)
    index = {name: position for position, name in enumerate(names)}
    return Dataset({"image": images}, tuple(index[label] for label in labels), names, folder.name)


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images that are still encoded, with their classes.

    Raises:
        ConfigurationError: the model has no image processor.
    """
    if pretrained.images is None:
        raise ConfigurationError(
            "model.factory: image-classification needs to know how images become the model's inputs; return (model, "
            "transform) from the factory, with transform: list of PIL images -> tensor [batch, channels, height, width]"
        )
    images = dataset.columns["image"]
    return [{"image": image, "labels": label} for image, label in zip(images, dataset.labels, strict=True)]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, torch.Tensor]:
    """Pixels [b, channels, height, width] under the model's own argument, and classes int64 [b]."""
    import torch

    images = pretrained.images
    assert images is not None
    pixels = images.transform([row["image"].open(images.mode) for row in rows])
    dtype = next(pretrained.model.parameters()).dtype
    return {images.argument: pixels.to(dtype)}, torch.tensor([row["labels"] for row in rows])


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Top-1 and top-5 accuracy beside the others: how many classes score higher than the right one."""
    rank = joined(records, "rank")
    return {"top1": float((rank < 1).mean()), "top5": float((rank < 5).mean()), **finish_classes(records, labels)}


TASK = Task(
    name="image-classification",
    description="one class for each image",
    inputs="image",
    read=read,
    claim=claim,
    read_folder=read_folder,
    of_classes=lambda dataset: dataset,
    encode=encode,
    collate=collate,
    loss=classification_loss,
    metrics=Metrics(record_classes, finish, ("top1",)),
    auto_class="AutoModelForImageClassification",
    class_endings=("ForImageClassificationWithTeacher",),
    new_head=True,
    classes=True,
)
