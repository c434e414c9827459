"""Finding and loading images, good and bad."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.vision_language import find_images, load_image


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is width x height, without pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", b"") + part(b"IEND", b"")


def test_files_folders_and_patterns_each_once(tmp_path: Path):
    for name in ("b.png", "a.JPG", "notes.txt", "deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_images([str(tmp_path), str(tmp_path / "b.png"), str(tmp_path / "**" / "*.png")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.JPG", "b.png", "deep/c.png"]
    assert find_images(["notes.txt"], tmp_path) == [tmp_path / "notes.txt"]  # named itself: judged when it is loaded


@pytest.mark.parametrize("source", ["nothing.png", "*.png", "empty"])
def test_nothing_there(tmp_path: Path, source: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match="images: "):
        find_images([source], tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello", "not an image"),
        (b"", "is empty"),
        (png_header(30_000, 30_000), "refused as a decompression bomb"),  # beyond Pillow's own limit
        (
            png_header(10_000, 11_000),
            r"10000 × 11000 pixels \(110 megapixels\), more than the 100,000,000 of max_megapixels",
        ),
    ],
    ids=["text", "empty", "bomb", "large"],
)
def test_bad_files(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        load_image(tmp_path / "bad.png", 100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_truncated_files(tmp_path: Path, suffix: str):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"damaged or truncated|not an image"):
        load_image(path, 100)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path):
    values = np.array([[1000, 2000], [3000, 5000]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = np.asarray(load_image(tmp_path / "deep.png", 1))
    assert loaded.shape == (2, 2, 3)
    assert loaded[:, :, 0].tolist() == [[0, 64], [128, 255]]


def test_what_is_transparent_becomes_black(tmp_path: Path):
    Image.new("RGBA", (1, 1), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", 1).getpixel((0, 0)) == (0, 0, 0)


def test_images_are_turned_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg", 1).size == (4, 8)
