"""Images from folders, tables and data sets, and those that must not be opened."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from layerlens.config import DataConfig
from layerlens.data import Dataset, load_dataset
from layerlens.data.images import StoredImage
from layerlens.exceptions import DataError

Image = pytest.importorskip("PIL.Image")
TASK = "image-classification"


def png(value: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cats", "dogs"):
        for number in range(3):
            path = tmp_path / "pictures" / name / "deeper" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number))
    (tmp_path / "pictures" / "cats" / "notes.txt").write_text("no image")
    return tmp_path


def read(folder: Path, source: str = "pictures", **options: object) -> Dataset:
    return load_dataset(DataConfig(source=source, **options), folder, TASK)


def test_the_sub_folder_is_the_class(folder: Path):
    dataset = read(folder)
    assert dataset.label_names == ("cats", "dogs")
    assert dataset.labels == (0, 0, 0, 1, 1, 1)
    assert [image.name for image in dataset.columns["image"]][:2] == ["cats/deeper/0.png", "cats/deeper/1.png"]
    opened = dataset.columns["image"][2].open("RGB")
    assert (opened.mode, opened.size, opened.getpixel((0, 0))) == ("RGB", (6, 4), (2, 2, 2))
    before = dataset.fingerprint
    (folder / "pictures/cats/deeper/0.png").write_bytes(png(9))
    assert read(folder).fingerprint != before  # by content, not by name


def test_folders_without_classes_are_refused(folder: Path):
    with pytest.raises(DataError, match="has images of 1 class; an image folder has one sub-folder for each of two"):
        read(folder, "pictures/..")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="has no images in sub-folders"):
        read(folder, "empty")


def test_damaged_and_foreign_files_are_named(folder: Path):
    whole = png(size=(300, 300))
    (folder / "pictures/cats/deeper/0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "pictures/cats/deeper/1.png").write_bytes(b"no picture at all")
    first, second, third = read(folder).columns["image"][:3]
    with pytest.raises(DataError, match=r"cats/deeper/0\.png is damaged or truncated"):
        first.open("RGB")
    with pytest.raises(DataError, match=r"cats/deeper/1\.png is not an image"):
        second.open("RGB")
    (folder / "pictures/cats/deeper/2.png").unlink()
    with pytest.raises(DataError, match=r"cannot read cats/deeper/2\.png: No such file"):
        third.open("RGB")


def test_a_decompression_bomb_is_refused_by_its_header(folder: Path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"bomb: .*decompression bomb"):
        StoredImage("bomb", data=bomb).open("RGB")
    (folder / "pictures/cats/deeper/0.png").write_bytes(png(size=(40, 30)))
    small = read(folder, max_image_pixels=1000).columns["image"][0]
    with pytest.raises(DataError, match=r"0\.png has 40 × 30 pixels, more than the 1,000 of data\.max_image_pixels"):
        small.open("RGB")


def test_photographs_are_turned_as_their_camera_says():
    image = Image.new("L", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert StoredImage("turned", data=buffer.getvalue()).open("RGB").size == (4, 6)


def test_tables_name_files_or_hold_bytes(folder: Path):
    lines = "".join(f'{{"image": "pictures/cats/deeper/{n}.png", "label": {n % 2}}}\n' for n in range(3))
    (folder / "d.jsonl").write_text(lines)
    files = read(folder, "d.jsonl")
    assert files.columns["image"][1].open("L").getpixel((0, 0)) == 1
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"img": [{"bytes": png(n), "path": None} for n in range(3)], "label": ["0", "1", "0"]},
        features=datasets.Features({"img": datasets.Image(), "label": datasets.Value("string")}),
    )
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "d.parquet")
    for source in ("saved", "d.parquet"):
        held = read(folder, source)
        assert held.labels == files.labels, source
        assert held.fingerprint == files.fingerprint, source
    (folder / "e.jsonl").write_text('{"image": "nowhere.png", "label": 0}\n{"image": 7, "label": 1}\n')
    with pytest.raises(DataError, match=r"sample 1 has no image file at .*nowhere\.png"):
        read(folder, "e.jsonl")
    (folder / "e.jsonl").write_text('{"image": 7, "label": 0}\n{"image": 7, "label": 1}\n')
    with pytest.raises(DataError, match="sample 1 has no image in column 'image'"):
        read(folder, "e.jsonl")


def test_digits_are_built_in():
    sklearn = pytest.importorskip("sklearn.datasets")
    dataset = load_dataset(DataConfig(source="builtin:digits"), None, TASK)
    found = sklearn.load_digits()
    assert dataset.label_names == tuple("0123456789")
    assert dataset.labels == tuple(found.target)
    pixels = np.array(dataset.columns["image"][5].open("L"))
    np.testing.assert_array_equal(pixels, np.rint(found.images[5] * 255 / 16))
    with pytest.raises(DataError, match="has images with classes, which sequence-classification cannot"):
        load_dataset(DataConfig(source="builtin:digits"))
    with pytest.raises(DataError, match="has texts with classes, which image-classification cannot"):
        load_dataset(DataConfig(source="builtin:stdlib-docstrings"), None, TASK)
