"""Boxes of COCO files as people have them: crowds, masks in runs, boxes over the edge, images in folders around."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from layerlens.config import DataConfig
from layerlens.data import load_dataset
from layerlens.exceptions import DataError

TASK = "object-detection"


def write(folder: Path, annotations: list[dict[str, Any]], file: str = "annotations/instances_train.json") -> Path:
    """Three images of 40 x 20 pixels, and these annotations of two categories with ids of their own."""
    for number in range(3):
        place = folder / f"train/{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), (50 * number, 0, 0)).save(place)
    images = [{"id": 10 + n, "file_name": f"{n}.png", "width": 40, "height": 20} for n in range(3)]
    images.append({"id": 99, "file_name": "gone.png", "width": 40, "height": 20})
    categories = [{"id": 17, "name": "dog"}, {"id": 3, "name": "cat"}]
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_boxes_crowds_and_masks_are_read_as_coco_means_them(tmp_path: Path):
    box = {"image_id": 10, "category_id": 17, "bbox": [10, 5, 20, 10], "iscrowd": 0}
    runs = {"counts": [0, 800], "size": [20, 40]}
    path = write(
        tmp_path,
        [
            box, box,  # one that stands twice is one
            {"image_id": 10, "category_id": 3, "bbox": [-4, 0, 14, 30]},  # over the edge
            {"image_id": 11, "category_id": 3, "segmentation": [[4, 2, 8, 2, 8, 10], [20, 2, 24, 18]], "iscrowd": 0},
            {"image_id": 11, "category_id": 3, "bbox": [0, 0, 40, 20], "segmentation": runs, "iscrowd": 1},
            {"image_id": 11, "category_id": 3, "segmentation": runs, "iscrowd": 0},
            {"image_id": 11, "category_id": 3, "bbox": [3, 3, 0, 5]},
        ],
    )  # fmt: skip
    found = load_dataset(DataConfig(source=str(path)), task=TASK)
    assert found.label_names == ("cat", "dog")  # in the order of their ids
    assert found.labels == ((1, 0), (0,), ())
    assert found.columns["boxes"][0] == ((0.25, 0.25, 0.75, 0.75), (0.0, 0.0, 0.25, 1.0))
    assert found.columns["boxes"][1] == ((0.1, 0.1, 0.6, 0.9),)
    reading = found.reading
    assert reading is not None
    assert list(reading.left_out) == [4]
    said = " ".join(reading.notes)
    for words in ("1 regions of crowds", "1 boxes without an area", "1 annotations without bbox and polygon"):
        assert words in said


def test_boxes_of_stored_pixels_are_turned_with_their_photograph(tmp_path: Path):
    """Exif says that the image is to be turned; its annotations have the size of the one or the other."""
    path = write(tmp_path, [{"image_id": n, "category_id": 3, "bbox": [4, 2, 8, 10]} for n in (10, 11)])
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, size in ((0, (40, 20)), (1, (20, 40))):
        Image.new("RGB", size).save(tmp_path / f"train/{number}.png", exif=exif)
    found = load_dataset(DataConfig(source=str(path)), task=TASK)
    assert found.columns["boxes"][0] == (pytest.approx((1 - 12 / 20, 4 / 40, 1 - 2 / 20, 12 / 40)),)
    assert found.columns["boxes"][1] == (pytest.approx((4 / 40, 2 / 20, 12 / 40, 12 / 20)),)  # of the upright one


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "has no list 'images'"),
        ('{"images": [], "annotations": []}', "has no list 'categories'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "an entry lacks 'file_name'"),
        ("{", "cannot be read as JSON"),
        ('{"images": [], "annotations": [], "categories": []}', "none of 0 images can be used"),
    ],
)
def test_what_is_no_coco_file_is_refused(tmp_path: Path, content: str, said: str):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        load_dataset(DataConfig(source=str(tmp_path / "a.json")), task=TASK)


def test_annotations_of_no_use_leave_their_image_out(tmp_path: Path):
    good = {"image_id": 10, "category_id": 3, "bbox": [0, 0, 10, 10]}
    unknown = {"image_id": 11, "category_id": 5, "bbox": [0, 0, 9, 9]}
    no_number = {"image_id": 12, "category_id": 3, "bbox": ["a", 0, 9, 9]}
    path = write(tmp_path, [good, unknown, no_number], "train/_annotations.coco.json")
    found = load_dataset(DataConfig(source=str(path)), task=TASK)
    assert len(found) == 1
    assert found.reading is not None
    assert "category 5, which is not listed" in found.reading.left_out[2]
    assert "not a list of numbers" in found.reading.left_out[3]
    with pytest.raises(DataError, match="none of its 3 images has a box"):
        load_dataset(DataConfig(source=str(write(tmp_path / "b", []))), task=TASK)
