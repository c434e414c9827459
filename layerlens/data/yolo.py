"""Data sets in the layout of YOLO trainers: a YAML file that names images, and a text file of labels for each image.

The rules are those of ultralytics' ``check_det_dataset``, ``get_img_files`` and ``verify_image_label``, which are not
called: they download fonts and data, run scripts that the YAML file holds, and write over JPEG files that they mend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from layerlens.data.dataset import Dataset
from layerlens.data.images import Check, StoredImage
from layerlens.data.pixels import SUFFIXES
from layerlens.data.rows import Reading
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.utils.places import check_readable

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in shares of the image's width and height."""
TOLERANCE = 0.01
"""How far rounding may put a coordinate outside the image."""
SMALLEST_SIDE = 10
"""Pixels; ultralytics takes no image with fewer."""


@dataclass(frozen=True)
class _Described:
    """What the YAML file says: the folder that places start from, the training images and the classes."""

    file: Path
    root: Path
    train: tuple[str, ...]
    names: tuple[str, ...]
    keypoint_values: int


def read_yolo(path: Path, max_pixels: int) -> Dataset:
    """The training images of a data set, their boxes in the column ``boxes``, and the class of each box as label.

    An image without a label file, or with an empty one, has no objects. A line of labels is ``class x y width height``
    in shares of the image, or ``class x1 y1 x2 y2 x3 y3 ...``, a polygon, of which the bounding box counts; of pose
    labels (``kpt_shape`` in the YAML file) the box counts. Images that cannot be read, and those whose labels break
    these rules, are left out with the reason.

    Args:
        path: the YAML file: ``train`` (a folder, an image, a text file with one image a line, or a list of those),
            ``names`` or ``nc``, and ``path``, the folder that the others start from.
        max_pixels: larger images are left out.

    Raises:
        DataNotFoundError: what ``train`` names is not there.
        DataError: the file is no description of a data set, or no image can be used.
    """
    described = _described(path)
    notes: list[str] = []
    files = list(dict.fromkeys(file for place in described.train for file in _images(described, place)))
    if not files:
        raise DataError(f"data.source: {path}: no images in {', '.join(described.train)}; known: {', '.join(SUFFIXES)}")
    images, labels, boxes, left_out = [], [], [], {}
    unlabelled, check = 0, Check()
    for number, file in enumerate(files, start=1):
        check_readable(file, path)
        label_file = _label_file(file)
        check_readable(label_file, path)
        unlabelled += not label_file.is_file()
        image = StoredImage(_name(file, described.root), path=file, max_pixels=max_pixels)
        try:
            check_image(file, image, check)
            found = list(_objects(label_file, described))
        except Unusable as error:
            left_out[number] = str(error)
            continue
        images.append(image)
        labels.append(tuple(kind for kind, _ in found))
        boxes.append(tuple(box for _, box in found))
    if not images:
        raise DataError(f"data.source: {path}: none of {len(files)} images can be used: the first {left_out[1]}")
    if unlabelled == len(files):
        raise DataError(
            f"data.source: {path}: none of {len(files)} images has a label file; the labels of images/a.png belong in "
            f"{_label_file(files[0])}"
        )
    if unlabelled:
        notes.append(f"{unlabelled} of {len(files)} images have no label file, and count as images without objects")
    reading = Reading(len(files), left_out=left_out, notes=(*notes, *check.notes))
    columns = {"image": tuple(images), "boxes": tuple(boxes)}
    return Dataset(columns, tuple(labels), described.names, path.name, reading=reading)


class Unusable(Exception):
    """Why an image is left out."""


def _described(path: Path) -> _Described:
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"data.source: {path} is not a YOLO data set (path, train, names): {error}") from error
    train = facts.get("train") if isinstance(facts, dict) else None
    places: list[Any] = train if isinstance(train, list) else [train]
    if not places or not all(isinstance(place, str) and place for place in places):
        raise DataError(
            f"data.source: {path} is not a YOLO data set (path, train, names): train must name a folder, a file or a "
            f"list of them, got {train!r}"
        )
    return _Described(
        path, _root(path, facts.get("path"), places[0]), tuple(places), _class_names(path, facts), _keypoints(facts)
    )


def _class_names(path: Path, facts: dict[str, Any]) -> tuple[str, ...]:
    names, count = facts.get("names"), facts.get("nc")
    if names is None and isinstance(count, int) and count > 0:
        return tuple(f"class_{number}" for number in range(count))
    if isinstance(names, dict) and all(isinstance(key, str) and key.isdigit() for key in names):
        names = {int(key): name for key, name in names.items()}  # JSON has no other keys
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(
            f"data.source: {path} is not a YOLO data set (path, train, names): names must list the classes, or number "
            f"them from 0 on, got {names!r}"
        )
    if isinstance(count, int) and count != len(names):
        raise DataError(f"data.source: {path}: names has {len(names)} classes and nc is {count}; they must agree")
    return tuple(map(str, names))


def _keypoints(facts: dict[str, Any]) -> int:
    """How many numbers of a line of pose labels are keypoints; 0 for other labels."""
    shape = facts.get("kpt_shape")
    return math.prod(shape) if isinstance(shape, list) and all(isinstance(n, int) for n in shape) else 0


def _root(path: Path, given: Any, first: str) -> Path:
    """The folder that places start from: ``path`` of the YAML file, from that file's folder on.

    Where there is no such folder (it was written on another machine), the file's own folder, if the images are there.
    """
    own = path.parent
    root = own / Path(str(given or ".")).expanduser()
    return root if root.is_dir() or not _place(own, first).exists() else own


def _place(root: Path, place: str) -> Path:
    """What ``place`` means; exports of Roboflow name ``../train/images`` for what lies beside the YAML file."""
    found = root / Path(place).expanduser()
    if not found.exists() and place.startswith("../"):
        found = root / place.removeprefix("../")
    return found


def _images(described: _Described, place: str) -> Iterator[Path]:
    """The image files that one entry of ``train`` means, by name."""
    found = _place(described.root, place)
    check_readable(found, described.file)
    if found.is_dir():
        yield from sorted(file for file in found.rglob("*") if _is_image(file) and file.is_file())
    elif _is_image(found) and found.is_file():
        yield found
    elif found.is_file():
        for line in found.read_text(encoding="utf-8-sig").splitlines():
            if not line.strip():
                continue
            file = Path(line.strip())
            if not file.is_absolute():  # "./" means the list's own folder; others mean the root, as COCO has them
                beside, below = found.parent / file, described.root / file
                file = beside if line.startswith("./") or not below.exists() else below
            if _is_image(file):
                yield file
    else:
        raise DataNotFoundError(f"data.source: {described.file}: no folder of images at {found}, and no list of them")


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _name(file: Path, root: Path) -> str:
    return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()


def _label_file(image: Path) -> Path:
    """``labels/x/a.txt`` of ``images/x/a.png``: the last folder of that name counts."""
    parts = list(image.parts[:-1])
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, image.name).with_suffix(".txt")


def check_image(file: Path, image: StoredImage, check: Check) -> None:
    """That the file is an image that can be read, and no strip of one."""
    if not file.is_file():
        raise Unusable(f"is not there, got {file}")
    if fault := check.fault(image):
        raise Unusable(f"{fault}, got {file}")
    header = image.header()
    if min(header.width, header.height) < SMALLEST_SIDE:
        raise Unusable(f"has sides of fewer than {SMALLEST_SIDE} pixels, got {file}")


def _objects(file: Path, described: _Described) -> Iterator[tuple[int, Box]]:
    """(class, box) of every line, lines that stand twice once.

    Raises:
        Unusable: a line breaks the rules.
    """
    if not file.is_file():
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"has a label file that cannot be read, got {file} ({error})") from error
    for line in dict.fromkeys(filter(str.strip, lines)):
        where = f"got {line!r} in {file}"
        try:
            numbers = [float(word) for word in line.split()]
        except ValueError as error:
            raise Unusable(f"has labels that are not numbers, {where}") from error
        if described.keypoint_values and len(numbers) == 5 + described.keypoint_values:
            numbers = numbers[:5]
        kind, values = (numbers[0], numbers[1:]) if numbers else (0.0, [])
        is_polygon = len(values) >= 6 and len(values) % 2 == 0
        if len(values) != 4 and not is_polygon:
            raise Unusable(f"has labels that are neither `class x y width height` nor a polygon, {where}")
        if not all(map(math.isfinite, numbers)):
            raise Unusable(f"has labels that are not numbers, {where}")
        if kind != int(kind) or not 0 <= kind < len(described.names):
            raise Unusable(f"has a class that is not below {len(described.names)}, {where}")
        if not all(-TOLERANCE <= value <= 1.0 + TOLERANCE for value in values):
            raise Unusable(f"has a box outside the range 0 to 1 (shares of the image), {where}")
        if is_polygon:
            across, down = values[0::2], values[1::2]
            yield int(kind), (min(across), min(down), max(across), max(down))
            continue
        x, y, width, height = values
        if width < 0.0 or height < 0.0:
            raise Unusable(f"has a box of negative size, {where}")
        yield int(kind), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
