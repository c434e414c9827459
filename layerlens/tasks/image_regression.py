"""Regression on images: a number for each, such as an age or a quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import IMAGES, LABELS, Table
from layerlens.data.values import is_number
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.image_classification import has_images, with_images
from layerlens.tasks.losses import regression_loss
from layerlens.tasks.metrics import Metrics
from layerlens.tasks.regression import finish, record
from layerlens.tasks.task import Claim, Task

if TYPE_CHECKING:
    import torch

NUMBERS = (*LABELS, "score", "value", "age", "rating", "quality")
"""Where the numbers usually stand."""


def read(table: Table, config: DataConfig) -> Dataset:
    """Images (paths or encoded bytes), and a number for each."""
    column = table.find(config.label_column, "label_column", NUMBERS)
    return Dataset({"image": table.images(config)}, table.numbers_of(column), (), table.place)


def claim(table: Table, config: DataConfig) -> Claim | None:
    """Images, each with a number that has a point."""
    column = table.named(config.label_column, NUMBERS)
    if column is None or not has_images(table, config):
        return None
    values = [value for value in table.peek(column) if value is not None]
    if not values or not all(map(is_number, values)) or all(float(value).is_integer() for value in values):
        return None
    return Claim(3, f"images in column {table.named(config.image_column, IMAGES)!r} and numbers in {column!r}")


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images that are still encoded, with their numbers."""
    return with_images(pretrained, dataset, TASK.name, dataset.labels)


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, torch.Tensor]:
    """Pixels [b, channels, height, width] by the model's own argument; numbers float32 [b]."""
    import torch

    images = pretrained.images
    assert images is not None
    return images.inputs(pretrained.model, [row["image"] for row in rows]), torch.tensor(
        [row["labels"] for row in rows]
    )


TASK = Task(
    name="image-regression",
    description="one number for each image, squared error; `regression` of rows with images is the same",
    inputs="image",
    read=read,
    claim=claim,
    encode=encode,
    collate=collate,
    loss=regression_loss,
    metrics=Metrics(record, finish, ("pearson",), lower=("mse", "mae")),
    auto_class="AutoModelForImageClassification",
    new_head=True,
    head_config={"num_labels": 1, "problem_type": "regression"},
)
