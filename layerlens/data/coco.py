"""Boxes of a JSON file in the format of COCO: ``images``, ``annotations`` and ``categories``.

As in COCO's own evaluation, a region that stands for a crowd (``iscrowd``) is no object. Categories are classes in the
order of their ids, whatever numbers these are.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerlens.data.dataset import Dataset
from layerlens.data.images import Check, StoredImage
from layerlens.data.pixels import upright_box
from layerlens.data.rows import Reading
from layerlens.data.yolo import Box, Unusable, check_image
from layerlens.exceptions import DataError
from layerlens.utils.places import check_readable

KEYS = ("images", "annotations", "categories")
CROWD, EMPTY, NO_BOX = (
    "regions of crowds (iscrowd), which are not objects",
    "boxes without an area inside their image",
    "annotations without bbox and polygon",
)


def read_coco(path: Path, max_pixels: int) -> Dataset:
    """The images, their boxes in the column ``boxes`` (shares of the image), and the class of each box as label.

    Of an annotation ``bbox`` counts, else the bounding box of its polygons. What is no object is counted and said;
    images that cannot be read are left out with the reason.

    Raises:
        DataError: the file is no such JSON, or no image can be used.
    """
    found = _parsed(path)
    try:
        categories = sorted(found["categories"], key=lambda one: one["id"])
        place = {one["id"]: number for number, one in enumerate(categories)}
        names = tuple(str(one.get("name", one["id"])) for one in categories)
        by_image = defaultdict[Any, list[Mapping[str, Any]]](list)
        for one in found["annotations"]:
            by_image[one["image_id"]].append(one)
        listed = [(one["id"], str(one["file_name"]), one) for one in found["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"data.source: {path} is not a COCO data set: an entry lacks {error}") from error
    folders, check = _folders(path), Check()
    images, labels, boxes, left_out, dropped = [], [], [], dict[int, str](), Counter[str]()
    for number, (key, name, facts) in enumerate(listed, start=1):
        file = _file(name, folders)
        check_readable(file, path)
        image = StoredImage(name, path=file, max_pixels=max_pixels)
        try:
            check_image(file, image, check)
            header = image.header()
            size = (facts.get("width") or header.width, facts.get("height") or header.height)
            turned = header.orientation if size == header.stored_size != (header.width, header.height) else 1
            objects = [(kind, upright_box(box, turned)) for kind, box in _objects(by_image[key], size, place, dropped)]
        except Unusable as error:
            left_out[number] = str(error)
            continue
        images.append(image)
        labels.append(tuple(kind for kind, _ in objects))
        boxes.append(tuple(box for _, box in objects))
    if not images:
        reason = left_out.get(1, "it lists none")
        raise DataError(f"data.source: {path}: none of {len(listed)} images can be used: the first {reason}")
    if not any(labels):
        raise DataError(f"data.source: {path}: none of its {len(images)} images has a box")
    notes = [f"{count:,} {reason}" for reason, count in dropped.items()]
    reading = Reading(len(listed), left_out=left_out, notes=(*notes, *check.notes))
    columns = {"image": tuple(images), "boxes": tuple(boxes)}
    return Dataset(columns, tuple(labels), names, path.name, reading=reading)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"data.source: {path} cannot be read as JSON: {error}") from error
    lacking = [key for key in KEYS if not isinstance(found, dict) or not isinstance(found.get(key), list)]
    if lacking:
        raise DataError(
            f"data.source: {path} is not a COCO data set: it has no list {lacking[0]!r}; give a JSON file with "
            f"{', '.join(KEYS)}, or the YAML file of a YOLO data set"
        )
    return dict(found)


def _folders(path: Path) -> list[Path]:
    """Where images are looked for: beside the file (Roboflow), or in the folders that COCO and its kin have."""
    own = path.parent
    split = path.stem.removeprefix("instances_")
    around = [own, own.parent] if own.name == "annotations" else [own]
    return [folder for base in around for folder in (base, base / "images", base / split, base / "images" / split)]


def _file(name: str, folders: Sequence[Path]) -> Path:
    places = [folder / part for part in (name, Path(name).name) for folder in folders]
    return next((place for place in places if place.is_file()), places[0])


def _objects(
    annotations: Sequence[Mapping[str, Any]], size: tuple[float, float], place: Mapping[Any, int], dropped: Counter[str]
) -> list[tuple[int, Box]]:
    """(class, box) of every object, those that stand twice once.

    Raises:
        Unusable: an annotation is none of the format.
    """
    found: dict[tuple[int, Box], None] = {}
    for one in annotations:
        if one.get("iscrowd"):
            dropped[CROWD] += 1
            continue
        if one.get("category_id") not in place:
            raise Unusable(f"has an annotation of the category {one.get('category_id')!r}, which is not listed")
        corners = _corners(one)
        if corners is None:
            dropped[NO_BOX] += 1
            continue
        left, top, right, bottom = (min(max(value / size[axis % 2], 0.0), 1.0) for axis, value in enumerate(corners))
        if right <= left or bottom <= top:
            dropped[EMPTY] += 1
            continue
        found[place[one["category_id"]], (left, top, right, bottom)] = None
    return list(found)


def _corners(annotation: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Left, top, right and bottom in pixels; None where the annotation says no place, or its mask alone."""
    try:
        box = annotation.get("bbox")
        if box:
            x, y, width, height = map(float, box)
            found = (x, y, x + width, y + height)
        else:
            polygons = annotation.get("segmentation")
            if not polygons or isinstance(polygons, Mapping):  # a mask in runs, of which nothing else is said
                return None
            values = [float(value) for polygon in polygons for value in polygon]
            found = (min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2]))
    except (TypeError, ValueError) as error:
        raise Unusable(f"has an annotation whose place is not a list of numbers ({error})") from error
    if not all(map(math.isfinite, found)):
        raise Unusable("has an annotation whose place is not a number")
    return found
