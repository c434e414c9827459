"""Semantic segmentation: the class of every pixel, from images and masks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.images import StoredImage
from layerlens.data.masks import (
    NO_CLASS,
    UNLABELLED,
    mask_fault,
    mask_folders,
    masked_images,
    read_mask,
    values_of,
)
from layerlens.data.rows import Reading
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.pretrained import ImageInput, PretrainedModel
from layerlens.integrations.torch_modules import precision_of
from layerlens.tasks.batches import Batch, Features, Inputs
from layerlens.tasks.image_classification import with_images
from layerlens.tasks.losses import logits_of
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, mean_loss
from layerlens.tasks.task import Task

if TYPE_CHECKING:
    import torch

MASKS = ("mask", "masks", "segmentation_mask", "segmentation_map", "annotation", "label")
"""Columns that masks usually stand in."""

SLACK = 0.01
"""Share of an image's side that scaling may move its edges by, beside half a pixel before and after."""


def read(table: Table, config: DataConfig) -> Dataset:
    """Images and masks, each a path or encoded bytes."""
    column = table.find(config.label_column, "label_column", MASKS)
    images = table.images(config)
    masks = table.images(config.model_copy(update={"image_column": column}))
    for place, (image, mask) in enumerate(zip(images, masks, strict=True)):
        if image is not None and mask is not None and (fault := mask_fault(image, mask)):
            table.leave_out(place, fault)
    kept = [None if place in table.left_out else mask for place, mask in enumerate(masks)]
    values, notes = values_of(kept, images)
    for place, (mask, found) in enumerate(zip(kept, values, strict=True)):
        if mask is not None and not found:
            table.leave_out(place, NO_CLASS)
    table.notes.extend(notes)
    return _dataset(images, kept, values, config, table.place)


def read_folder(folder: Path, config: DataConfig) -> Dataset:
    """The images of one folder, and the masks of the same names in the one beside it."""
    images, masks, values, reading = masked_images(folder, config.max_image_pixels)
    return _dataset(images, masks, values, config, folder.name, reading)


def _dataset(
    images: Sequence[StoredImage | None], masks: Sequence[StoredImage | None], values: Sequence[tuple[int, ...]],
    config: DataConfig, place: str, reading: Reading | None = None,
) -> Dataset:  # fmt: skip
    """The samples; the label of each is the classes that its mask has.

    Raises:
        DataError: a mask has a class without a name.
    """
    largest = max((max(found, default=0) for found in values), default=0)
    binary = largest == UNLABELLED
    numbers = ("0", str(UNLABELLED)) if binary else tuple(map(str, range(largest + 1)))
    names = tuple(config.label_names) if isinstance(config.label_names, list) else numbers
    if len(numbers) > len(names):
        raise DataError(
            f"data.label_names: has {len(names)} names, and a mask has the class {largest}; give a name for each "
            f"number from 0 on ({UNLABELLED} is no class unless 0 is the only other number)"
        )
    labels = tuple(tuple(int(value > 0) if binary else value for value in found) for found in values)
    return Dataset(
        {"image": tuple(images), "mask": tuple(masks), "values": tuple(values)}, labels, names, place, reading=reading
    )


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images and masks that are still encoded, and which output each value of the masks is."""
    pairs = zip(dataset.columns["values"], dataset.labels, strict=True)
    outputs = {value: output for values, label in pairs for value, output in zip(values, label, strict=True)}
    found = with_images(pretrained, dataset, TASK.name, dataset.labels)
    images = pretrained.images
    if images is not None and (images.processor is None or not _takes_masks(images.processor)):
        refuse_cuts(images, dataset.columns["image"][0].open(images.mode).size)
    return [one | {"mask": mask, "outputs": outputs} for one, mask in zip(found, dataset.columns["mask"], strict=True)]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Pixels [b, channels, height, width]; classes int64 [b, height, width], ``UNLABELLED`` where there is none.

    The image processor of transformers turns masks as it turns their images. Of another transform, masks get the size
    that images have after it.
    """
    import torch

    images = pretrained.images
    assert images is not None
    outputs = rows[0]["outputs"]
    table = np.full(max((UNLABELLED, *outputs)) + 1, UNLABELLED)
    table[list(outputs)] = list(outputs.values())
    masks = [table[np.clip(read_mask(row["mask"], row["image"]), 0, len(table) - 1)] for row in rows]
    processor: Any = images.processor
    if processor is not None and _takes_masks(processor):
        opened = [row["image"].open(images.mode) for row in rows]
        made = processor(opened, segmentation_maps=masks, return_tensors="pt", **_unreduced(processor))
        pixels = made["pixel_values"].to(precision_of(pretrained.model))
        return {images.argument: pixels}, torch.as_tensor(np.stack([np.asarray(one) for one in made["labels"]])).long()
    inputs = images.inputs(pretrained.model, [row["image"] for row in rows])
    size = inputs[images.argument].shape[-2:]
    resized = [
        torch.nn.functional.interpolate(torch.as_tensor(mask)[None, None].float(), size=size, mode="nearest")[0, 0]
        for mask in masks
    ]
    return inputs, torch.stack(resized).long()


def refuse_cuts(images: ImageInput, size: tuple[int, int]) -> None:
    """Refuse a transform that does more to an image of this width and height than scale it: masks are only scaled.

    It is shown images that grow brighter from left to right and from top to bottom, and black and white ones, between
    which its normalisation is a line.

    Raises:
        ConfigurationError: it cuts, pads, turns or mirrors images.
    """
    from PIL import Image

    across, down = (np.linspace(0.0, 255.0, side).round().astype(np.uint8) for side in size)
    shown = [np.tile(across, (size[1], 1)), np.tile(down[:, None], (1, size[0]))]
    shown += [np.full_like(shown[0], 0), np.full_like(shown[0], 255)]
    pixels = images.transform([Image.fromarray(one).convert(images.mode) for one in shown])[:, 0].double()
    right, below, black, white = pixels
    seen = white != black
    if not bool(seen.any()):
        return  # each image is normalised by itself: what becomes of places cannot be seen
    for ramp, place, side in ((right, 1, size[0]), (below, 0, size[1])):
        share = ((ramp - black) / (white - black)).mean(1 - place)
        near = SLACK + 0.5 / len(share) + 0.5 / side
        if not bool(seen.all()) or abs(float(share[0])) > near or abs(float(share[-1]) - 1.0) > near:
            raise ConfigurationError(
                "model.factory: the image transform cuts, pads or turns images, and masks are only scaled, so that "
                f"they would not lie on them (tried on {size[0]} × {size[1]} pixels); let it scale whole images, such "
                "as torchvision's Resize((height, width)), or use the task custom with data of your own"
            )


def _takes_masks(processor: Any) -> bool:
    return "segmentation_maps" in inspect.signature(processor.preprocess).parameters


def _unreduced(processor: Any) -> dict[str, bool]:
    """Masks are as the user has them: the first class is none of background that is taken away."""
    return {"do_reduce_labels": False} if getattr(processor, "do_reduce_labels", False) else {}


def scores_of(output: Any, size: Sequence[int]) -> torch.Tensor:
    """Scores [b, classes, height, width] at the size of the masks: models give them at a fraction of it."""
    import torch

    logits = logits_of(output["out"] if isinstance(output, Mapping) and "out" in output else output)  # torchvision
    return torch.nn.functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def loss(output: Any, batch: Batch) -> torch.Tensor:
    """Cross-entropy, the mean over each image's labelled pixels, [b]."""
    import torch

    losses__bhw = torch.nn.functional.cross_entropy(
        scores_of(output, batch.labels.shape[-2:]), batch.labels, ignore_index=UNLABELLED, reduction="none"
    )
    labelled = (batch.labels != UNLABELLED).flatten(1).sum(1).clamp(min=1)
    return losses__bhw.flatten(1).sum(1) / labelled


def right(output: Any, labels: torch.Tensor) -> torch.Tensor:
    """Share of each image's labelled pixels that are taken for their class, [b]."""
    labelled = labels != UNLABELLED
    same = (scores_of(output, labels.shape[-2:]).argmax(1) == labels) & labelled
    return same.flatten(1).sum(1) / labelled.flatten(1).sum(1).clamp(min=1)


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """How many pixels of each class were taken for each class (rows: actual), by scikit-learn."""
    from sklearn.metrics import confusion_matrix

    labels = batch[TARGETS]
    scores = scores_of(output.output, labels.shape[-2:])
    kept = labels != UNLABELLED
    actual, predicted = labels[kept].cpu().numpy(), scores.argmax(1)[kept].cpu().numpy()
    counts = confusion_matrix(actual, predicted, labels=range(scores.shape[1]))
    return {**mean_loss(output, len(labels)), "counts": counts}


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Mean intersection over union of the classes that are there, and the share of right pixels, by scikit-learn."""
    from sklearn.metrics import accuracy_score, jaccard_score

    counts = np.sum([record["counts"] for record in records], axis=0)
    actual, predicted = (places.reshape(-1) for places in np.indices(counts.shape))
    weights = counts.reshape(-1)
    there = np.flatnonzero(counts.sum(0) + counts.sum(1))
    iou = jaccard_score(actual, predicted, labels=there, average="macro", sample_weight=weights, zero_division=0.0)
    return {"mean_iou": float(iou), "pixel_accuracy": float(accuracy_score(actual, predicted, sample_weight=weights))}


TASK = Task(
    name="semantic-segmentation",
    description="a class for each pixel, from a folder `images` beside a folder `masks`, or a table of both",
    inputs="image",
    read=read,
    read_folder=read_folder,
    claims_folder=lambda folder: mask_folders(folder) is not None,
    encode=encode,
    collate=collate,
    loss=loss,
    metrics=Metrics(record, finish, ("mean_iou",)),
    auto_class="AutoModelForSemanticSegmentation",
    new_head=True,
    classes=True,
    model_targets=(),
    right=right,
)
