"""Data sets as YOLO trainers take them: places, labels and names by ultralytics' rules, odd images left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from layerlens.data.yolo import read_yolo
from layerlens.exceptions import DataError, DataNotFoundError

PIXELS = 2**26
SQUARE = (0.25, 0.25, 0.75, 0.75)
LINE = "0 0.5 0.5 0.5 0.5\n"


def make(root: Path, labels: dict[str, str], described: str = "train: images\nnames: [cat, dog]\n") -> Path:
    """A data set below ``root`` with an image for each of ``labels``: its path without suffix -> its label file."""
    for name, text in labels.items():
        image = root / f"{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20)).save(image)
        label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text, encoding="utf-8")
    (root / "data.yaml").write_text(described, encoding="utf-8")
    return root / "data.yaml"


def names_of(dataset) -> list[str]:
    return [image.name for image in dataset.columns["image"]]


@pytest.mark.parametrize(
    ("text", "kinds", "boxes"),
    [
        (LINE, (0,), (SQUARE,)),
        ("", (), ()),
        (LINE + LINE, (0,), (SQUARE,)),  # a line that stands twice counts once
        ("\ufeff" + LINE, (0,), (SQUARE,)),
        ("1 0.25 0.25 0.75 0.25 0.75 0.75\n", (1,), (SQUARE,)),
        ("1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n" + LINE, (1, 0), (SQUARE, SQUARE)),  # ultralytics drops the image
        ("1 0.5 0.5 0.5 0.5 0.3 0.3 2 0.4 0.4 1\n", (1,), (SQUARE,)),  # keypoints
        ("0 0.5 0.5 1.000001 1.0\n", (0,), ((-5e-7, 0.0, 1.0000005, 1.0),)),  # rounded outwards
    ],
)
def test_labels(tmp_path: Path, text: str, kinds: tuple[int, ...], boxes):
    keypoints = "kpt_shape: [2, 3]\n" if "2 0.4" in text else ""
    described = f"train: images\nnames: [cat, dog]\n{keypoints}"
    dataset = read_yolo(make(tmp_path, {"images/a": text}, described), PIXELS)
    assert dataset.labels == (kinds,)
    assert dataset.columns["boxes"][0] == tuple(pytest.approx(box) for box in boxes)
    assert dataset.label_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0 0.5 0.5\n", "neither `class x y width height` nor a polygon"),
        ("7 0.5 0.5 0.1 0.1\n", "a class that is not below 2"),
        ("0.5 0.5 0.5 0.1 0.1\n", "a class that is not below 2"),
        ("-1 0.5 0.5 0.1 0.1\n", "a class that is not below 2"),
        ("0 5 0.5 0.1 0.1\n", "a box outside the range 0 to 1"),
        ("0 0.5 0.5 -0.005 0.1\n", "a box of negative size"),
        ("cat 0.5 0.5 0.1 0.1\n", "labels that are not numbers"),
        ("nan 0.5 0.5 0.1 0.1\n", "labels that are not numbers"),
        ("0 inf 0.5 0.1 0.1\n", "labels that are not numbers"),
    ],
)
def test_an_image_with_odd_labels_is_left_out(tmp_path: Path, text: str, reason: str):
    dataset = read_yolo(make(tmp_path, {"images/a": text, "images/b": LINE}), PIXELS)
    assert names_of(dataset) == ["images/b.png"]
    assert len(dataset.notes) == 1
    assert reason in dataset.notes[0]
    assert "1 of 2" in dataset.notes[0]
    with pytest.raises(DataError, match="none of 1 images can be used"):
        read_yolo(make(tmp_path / "alone", {"images/a": text}), PIXELS)


def test_images_that_cannot_be_read_are_counted(tmp_path: Path):
    path = make(tmp_path, {f"images/{name}": LINE for name in "abcde"})
    (tmp_path / "images/a.png").write_bytes(b"")
    (tmp_path / "images/b.png").write_bytes(b"no image")
    Image.new("RGB", (4, 40)).save(tmp_path / "images/c.png")
    dataset = read_yolo(path, PIXELS)
    assert names_of(dataset) == ["images/d.png", "images/e.png"]
    told = "\n".join(dataset.notes)
    assert told.count("left out 1 of 5 rows") == 3
    assert "sample 1 is empty" in told
    assert "not an image that Pillow can read" in told
    assert "fewer than 10 pixels" in told
    assert "more than the 500 of data.max_image_pixels" in "".join(with_a_large_image(path).notes)


def with_a_large_image(path: Path):
    Image.new("RGB", (40, 12)).save(path.parent / "images/d.png")
    return read_yolo(path, 500)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ("path: .\ntrain: images/x\nnames: {0: cat, 1: dog}\n", ["images/x/a.png", "images/x/b.png"]),
        ('{"train": "images/x", "names": {"0": "cat", "1": "dog"}}', ["images/x/a.png", "images/x/b.png"]),  # JSON
        ("train: [images/x, images/y]\nnames: [cat, dog]\n", ["images/x/a.png", "images/x/b.png", "images/y/c.png"]),
        ("train: ../images/x\nnc: 2\nnames: ['cat', 'dog']\n", ["images/x/a.png", "images/x/b.png"]),  # Roboflow
        ("path: /content/elsewhere\ntrain: images/y\nnames: [cat, dog]\n", ["images/y/c.png"]),  # another machine's
        ("train: images/x/a.png\nnames: [cat, dog]\n", ["images/x/a.png"]),
        ("train: dotted.txt\nnames: [cat, dog]\n", ["images/y/c.png", "images/x/a.png"]),
        ("train: plain.txt\nnames: [cat, dog]\n", ["images/x/b.png"]),
        ("train: images/x\nnc: 2\n", ["images/x/a.png", "images/x/b.png"]),
    ],
)
def test_places(tmp_path: Path, described: str, expected: list[str]):
    path = make(tmp_path, {"images/x/a": LINE, "images/x/b": LINE, "images/y/c": LINE}, described)
    (tmp_path / "dotted.txt").write_text("./images/y/c.png\n\n./images/x/a.png\n./notes.md\n", encoding="utf-8")
    (tmp_path / "plain.txt").write_text("images/x/b.png\n", encoding="utf-8")
    dataset = read_yolo(path, PIXELS)
    assert [name.removeprefix("./") for name in names_of(dataset)] == expected
    assert dataset.labels == ((0,),) * len(expected)
    assert dataset.label_names == (("class_0", "class_1") if "names" not in described else ("cat", "dog"))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("names: [cat]\n", "train must name a folder"),
        ("train: 3\nnames: [cat]\n", "train must name a folder"),
        ("train: images\n", "names must list the classes"),
        ("train: images\nnames: {1: cat, 2: dog}\n", "number them from 0 on"),
        ("train: images\nnames: [cat]\nnc: 3\n", "names has 1 classes and nc is 3"),
        ("train: nowhere\nnames: [cat]\n", "no folder of images at"),
        ("train: empty.txt\nnames: [cat]\n", "no images in empty.txt"),
        ("- 1\n", "train must name a folder"),
        (": [", "is not a YOLO data set"),
    ],
)
def test_descriptions_that_are_none(tmp_path: Path, described: str, message: str):
    path = make(tmp_path, {"images/a": LINE}, described)
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises((DataError, DataNotFoundError), match=message):
        read_yolo(path, PIXELS)


def test_images_without_label_files(tmp_path: Path):
    path = make(tmp_path, {"images/a": LINE, "images/b": LINE})
    (tmp_path / "labels/a.txt").unlink()
    dataset = read_yolo(path, PIXELS)
    assert dataset.labels == ((), (0,))
    assert dataset.reading.notes == ("1 of 2 images have no label file, and count as images without objects",)
    (tmp_path / "labels/b.txt").unlink()
    with pytest.raises(DataError, match=r"none of 2 images has a label file; .* belong in .*labels/a\.txt"):
        read_yolo(path, PIXELS)
