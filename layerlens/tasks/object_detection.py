"""Object detection: boxes in images, for detectors with a loss of their own; data in the layouts of YOLO and COCO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from layerlens.config import DataConfig
from layerlens.data.coco import read_coco
from layerlens.data.dataset import Dataset
from layerlens.data.labels import by_hand
from layerlens.data.load import rows_of_function
from layerlens.data.read import dataset_of
from layerlens.data.rows import SourceRows
from layerlens.data.table import Table
from layerlens.data.yolo import read_yolo
from layerlens.exceptions import ConfigurationError, DataNotFoundError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.ultralytics_loss import DetectionTargets, detection_targets, sample_losses
from layerlens.registry import source_of
from layerlens.storage import local_file
from layerlens.tasks.batches import Batch, Features, Inputs
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, mean_loss
from layerlens.tasks.task import Task
from layerlens.utils.user_code import REFERENCE

if TYPE_CHECKING:
    import torch


def load(config: DataConfig, base_dir: Path | None) -> Dataset:
    """Images with the class of each object as label and its place in the column ``boxes``.

    Args:
        config: its source is ``module:function`` of the user's that returns rows (see ``read``), a YAML file as
            ``data.yolo`` reads it, or a JSON file as ``data.coco`` does.
        base_dir: folder that a relative source starts from.

    Raises:
        DataNotFoundError: no such data.
        DataError: nothing of it can be used.
    """
    path = (base_dir or Path()) / local_file(config.source).expanduser()
    if REFERENCE.fullmatch(config.source) and not path.exists():
        return dataset_of(SourceRows.of(rows_of_function(config.source, base_dir)), config.source, config, read)
    if not path.is_file():
        raise DataNotFoundError(
            f"data.source: no file at {path}; give the YAML file of a YOLO data set, or the JSON file of a COCO one"
        )
    reader = read_coco if path.suffix.lower() == ".json" else read_yolo
    return by_hand(reader(path, config.max_image_pixels), config.label_names)


def read(table: Table, config: DataConfig) -> Dataset:
    """Images, and the objects in them: lists of (class, x1, y1, x2, y2) with places in shares of the image."""
    column = table.find(config.label_column, "label_column", ("objects",))
    found: list[Any] = []
    for place, objects in enumerate(table.values(column)):
        try:
            found.append(tuple((str(kind), tuple(map(float, box))) for kind, *box in objects))
            sound = all(len(box) == 4 for _, box in found[-1])
        except (TypeError, ValueError):
            sound = False
        if not sound:
            found[place:] = [()]
            table.leave_out(
                place, f"has no objects in column {column!r}; give a list of (class, x1, y1, x2, y2), in shares of the "
                "image",
            )  # fmt: skip
    names = sorted({kind for objects in found for kind, _ in objects})
    labels = tuple(tuple(names.index(kind) for kind, _ in objects) for objects in found)
    boxes = tuple(tuple(box for _, box in objects) for objects in found)
    return Dataset({"image": table.images(config), "boxes": boxes}, labels, tuple(names), table.place)


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images that are still encoded, with their objects.

    Raises:
        ConfigurationError: the model is no detector of ultralytics.
    """
    if pretrained.images is None or source_of(pretrained.path)[0].default_task != TASK.name:
        raise ConfigurationError(
            "model.name_or_path: object-detection takes ultralytics:WEIGHTS.pt, not detectors of transformers (DETR, "
            "RT-DETR)"
        )
    columns = zip(dataset.columns["image"], dataset.labels, dataset.columns["boxes"], strict=True)
    return [{"image": image, "labels": tuple(zip(kinds, boxes, strict=True))} for image, kinds, boxes in columns]


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """Pixels [b, 3, side, side] as argument ``x``, and ``DetectionTargets``."""
    images = pretrained.images
    assert images is not None
    opened = [row["image"].open(images.mode) for row in rows]
    pixels = images.transform(opened)
    sizes = [image.size for image in opened]
    targets = detection_targets(pretrained, sizes, pixels.shape[-1], [row["labels"] for row in rows])
    return {images.argument: pixels}, targets


def loss(output: Any, batch: Batch) -> torch.Tensor:
    """The detector's own loss of each image, [b]."""
    return sample_losses(output, batch.labels)


def record(output: Any, batch: Judged, decode: Decode | None) -> Record:
    """The boxes found in every image, and which of them are right."""
    from layerlens.integrations.ultralytics_loss import matched

    targets = cast(DetectionTargets, cast(Mapping[str, Any], batch)[TARGETS])
    return {**mean_loss(output, output.items), "objects": matched(output.output, targets)}


def finish(records: Sequence[Record], labels: Sequence[str]) -> dict[str, float]:
    """Mean average precision of all images."""
    from layerlens.integrations.ultralytics_loss import average_precision

    return average_precision([image for record in records for image in record["objects"]])


TASK = Task(
    name="object-detection",
    description="boxes, for YOLO detectors (`ultralytics:WEIGHTS.pt`) with their own loss, in data sets of YOLO (YAML) "
    "or COCO (JSON). Not supported: DETR, RT-DETR, and YOLO models for segments, poses, oriented boxes and classes",
    inputs="image",
    load=load,
    file_suffixes=(".yaml", ".yml"),
    read=read,
    encode=encode,
    collate=collate,
    loss=loss,
    metrics=Metrics(record, finish, ("map50_95",)),
    class_endings=("ForObjectDetection", "DetectionModel"),
    model_targets=(),
    no_study="a detector's boxes are matched in lists of their own length, which no tensor holds",
)
