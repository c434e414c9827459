"""Images with boxes: the plates that LayerLens draws, and data sets in the layout of YOLO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from layerlens.data.dataset import Dataset
from layerlens.data.images import SUFFIXES, StoredImage
from layerlens.data.plates import CLASSES, draw_plates
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.storage import local_file
from layerlens.utils.readable import check_readable

PLATES, PLATES_COUNT, PLATES_SEED = "builtin:plates", 400, 20_002
"""A built-in data set that shares no plate with those that the builtin detector was trained or judged on."""

Objects = tuple[tuple[str, float, float, float, float], ...]
"""Of one image: class name, and x1, y1, x2, y2 in shares of its width and height."""


def detection_dataset(source: str, base_dir: Path | None, max_pixels: int) -> Dataset:
    """Images with ``Objects`` as labels.

    Args:
        source: ``builtin:plates``, or a YAML file with ``path``, ``train`` and ``names`` as YOLO trainers read it:
            the labels of ``images/x/a.png`` stand in ``labels/x/a.txt``, a line ``class x y width height`` for each
            object, in shares of the image; no file, no objects.
        base_dir: folder that a relative source starts from.
        max_pixels: larger images are refused when they are opened.

    Raises:
        DataNotFoundError: no such data.
        DataError: a file cannot be read, with its line.
    """
    if source == PLATES:
        return _plates()
    path = (base_dir or Path()) / local_file(source).expanduser()
    if not path.is_file():
        raise DataNotFoundError(f"data.source: no file at {path}; give the YAML file of a YOLO data set, or {PLATES}")
    return _yolo(path, max_pixels)


def _plates() -> Dataset:
    images, labels = [], []
    for index, plate in enumerate(draw_plates(PLATES_COUNT, PLATES_SEED)):
        height, width = plate.pixels.shape[:2]
        images.append(StoredImage(f"plate {index}", pixels=plate.pixels))
        labels.append(
            tuple(
                (CLASSES[label], x1 / width, y1 / height, x2 / width, y2 / height)
                for label, (x1, y1, x2, y2) in zip(plate.labels, plate.boxes, strict=True)
            )
        )
    return Dataset({"image": tuple(images)}, tuple(labels), (), "plates drawn by LayerLens")


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
