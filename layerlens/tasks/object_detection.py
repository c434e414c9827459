"""Object detection: boxes in images, for detectors that bring their own loss; data sets in the layout of YOLO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.images import SUFFIXES, StoredImage
from layerlens.data.load import rows_of_function
from layerlens.data.read import dataset_of
from layerlens.data.rows import SourceRows
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError, DataError, DataNotFoundError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.ultralytics_loss import DetectionTargets, detection_targets, sample_losses
from layerlens.registry import source_of
from layerlens.storage import local_file
from layerlens.tasks.batches import Batch, Features, Inputs
from layerlens.tasks.metrics import TARGETS, Decode, Judged, Metrics, Record, mean_loss
from layerlens.tasks.task import Task
from layerlens.utils.places import check_readable
from layerlens.utils.user_code import REFERENCE

if TYPE_CHECKING:
    import torch

Objects = tuple[tuple[str, float, float, float, float], ...]
"""Of one image: class name, and x1, y1, x2, y2 in shares of its width and height."""


def load(config: DataConfig, base_dir: Path | None) -> Dataset:
    """Images with ``Objects`` as labels.

    Args:
        config: its source is ``module:function`` of the user's that returns rows (see ``read``), or a YAML file with
            ``path``, ``train`` and ``names`` as YOLO trainers read it: the labels of ``images/x/a.png`` stand in
            ``labels/x/a.txt``, a line ``class x y width height`` for each object, in shares of the image; no file, no
            objects.
        base_dir: folder that a relative source starts from.

    Raises:
        DataNotFoundError: no such data.
        DataError: a file cannot be read, with its line.
    """
    path = (base_dir or Path()) / local_file(config.source).expanduser()
    if REFERENCE.fullmatch(config.source) and not path.exists():
        return dataset_of(SourceRows.of(rows_of_function(config.source, base_dir)), config.source, config, read)
    if not path.is_file():
        raise DataNotFoundError(f"data.source: no file at {path}; give the YAML file of a YOLO data set")
    return _yolo(path, config.max_image_pixels)


def read(table: Table, config: DataConfig) -> Dataset:
    """Images, and the objects in them: lists of (class, x1, y1, x2, y2) with places in shares of the image."""
    column = table.find(config.label_column, "label_column", ("objects",))
    labels: list[Any] = []
    for place, objects in enumerate(table.values(column)):
        try:
            labels.append(tuple((str(kind), *map(float, box)) for kind, *box in objects))
            sound = all(len(one) == 5 for one in labels[-1])
        except (TypeError, ValueError):
            sound = False
        if not sound:
            labels[place:] = [()]
            table.leave_out(
                place, f"has no objects in column {column!r}; give a list of (class, x1, y1, x2, y2), in shares of the "
                "image",
            )  # fmt: skip
    return Dataset({"image": table.images(config)}, tuple(labels), (), table.place)


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Images that are still encoded, with their objects.

    Raises:
        ConfigurationError: the model is no detector of ultralytics.
    """
    if pretrained.images is None or source_of(pretrained.path)[0].default_task != TASK.name:
        raise ConfigurationError("model.name_or_path: object-detection takes ultralytics:WEIGHTS.pt")
    images = dataset.columns["image"]
    return [{"image": image, "labels": found} for image, found in zip(images, dataset.labels, strict=True)]


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


def _yolo(path: Path, max_pixels: int) -> Dataset:
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
        root = path.parent / Path(str(described.get("path") or ".")).expanduser()
        folder, names = root / str(described["train"]), described["names"]
        names = dict(names) if isinstance(names, dict) else dict(enumerate(names))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"data.source: {path} is no YOLO data set (path, train, names): {error}") from error
    check_readable(folder, path)
    if not folder.is_dir():
        raise DataNotFoundError(f"data.source: {path}: no folder of images at {folder}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"data.source: {path}: no images in {folder}")
    for file in files:
        check_readable(file, path)
    images = tuple(StoredImage(file.relative_to(folder).as_posix(), path=file, max_pixels=max_pixels) for file in files)
    return Dataset({"image": images}, tuple(_objects(file, folder, names) for file in files), (), path.name)


def _objects(image: Path, folder: Path, names: dict[Any, Any]) -> Objects:
    parts = list(folder.parts)
    if "images" in parts:  # the last one, as YOLO trainers replace it
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    file = (Path(*parts) / image.relative_to(folder)).with_suffix(".txt")
    check_readable(file, folder)
    if not file.is_file():
        return ()
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            kind, x, y, width, height = (float(word) for word in line.split())
            name = str(names[int(kind)])
        except (ValueError, KeyError) as error:
            raise DataError(
                f"data.source: {file}:{number}: must be `class x y width height` with a class below {len(names)}, got "
                f"{line!r}"
            ) from error
        if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < width <= 1 and 0 < height <= 1):
            raise DataError(f"data.source: {file}:{number}: a box is in shares of the image, 0 to 1, got {line!r}")
        found.append((name, x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return tuple(found)


TASK = Task(
    name="object-detection",
    description="boxes; `ultralytics:` models with their own loss",
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
    study=False,
)
