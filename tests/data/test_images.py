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
from layerlens.data.pixels import ORIENTATION, upright, upright_box
from layerlens.exceptions import DataError

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
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
    dataset = read(folder)
    assert [image.name for image in dataset.columns["image"]][:2] == ["cats/deeper/2.png", "dogs/deeper/0.png"]
    assert dataset.reading is not None
    assert (dataset.reading.total, len(dataset)) == (6, 4)
    said = "\n".join(dataset.notes)
    assert "left out 1 of 6 files: cats/deeper/0.png is damaged or truncated" in said
    assert "left out 1 of 6 files: cats/deeper/1.png is not an image" in said
    (folder / "pictures/cats/deeper/2.png").unlink()  # after it was found
    with pytest.raises(DataError, match=r"cats/deeper/2\.png cannot be read: No such file"):
        dataset.columns["image"][0].open("RGB")


def test_a_decompression_bomb_is_refused_by_its_header(folder: Path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"bomb: .*decompression bomb"):
        StoredImage("bomb", data=bomb).open("RGB")
    (folder / "pictures/cats/deeper/0.png").write_bytes(png(size=(40, 30)))
    notes = read(folder, max_image_pixels=1000).notes
    assert len(notes) == 1
    assert (
        "cats/deeper/0.png has 40 × 30 pixels (0.0012 megapixels), more than the 1,000 of data.max_image_p" in notes[0]
    )


def test_photographs_are_turned_as_their_camera_says():
    image = Image.new("L", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert StoredImage("turned", data=buffer.getvalue()).open("RGB").size == (4, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_sizes_and_boxes_are_turned_upright_as_pillow_turns_them(tmp_path: Path, orientation: int):
    colours = random_pixels((5, 8, 3), 256).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(colours).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    image = StoredImage("x", path=tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(image.open("RGB")), expected)
    header = image.header()
    assert (header.height, header.width) == expected.shape[:2]
    assert header.stored_size == (8, 5)
    np.testing.assert_array_equal(upright(colours, orientation), expected)
    marked = np.zeros((5, 8), bool)
    marked[1:3, 2:7] = True
    left, top, right, bottom = upright_box((2 / 8, 1 / 5, 7 / 8, 3 / 5), orientation)
    high, wide = expected.shape[:2]
    box = np.zeros((high, wide), bool)
    box[round(top * high) : round(bottom * high), round(left * wide) : round(right * wide)] = True
    np.testing.assert_array_equal(box, upright(marked, orientation))


def test_deep_colours_are_turned_too(tmp_path: Path):
    """Pillow has no mode for them, so they are not turned by it."""
    colours = random_pixels((5, 8, 3), 65536).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    exif = Image.Exif()
    exif[ORIENTATION] = 6
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 5, 16, 2, 0, 0, 0))
    chunks += chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + chunk(b"IDAT", zlib.compress(rows))
    data = b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")
    low, high = int(colours.min()), int(colours.max())
    expected = np.rint((upright(colours, 6).astype(float) - low) * 255 / (high - low))
    np.testing.assert_array_equal(np.asarray(StoredImage("x", data=data).open("RGB")), expected)


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
    with pytest.raises(DataError, match="has images with classes, which do not fit the task sequence-classification"):
        load_dataset(DataConfig(source="builtin:digits"))
    with pytest.raises(DataError, match="has texts with classes, which do not fit the task image-classification"):
        load_dataset(DataConfig(source="builtin:stdlib-docstrings"), None, TASK)


def random_pixels(shape: tuple[int, ...] = (32, 32, 3), top: int = 256) -> np.ndarray:
    kind = np.uint8 if top <= 256 else np.uint16
    return np.random.default_rng(0).integers(0, top, shape).astype(kind)


@pytest.mark.parametrize("top", [4096, 65536], ids=["12 bits", "16 bits"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_images_keep_their_brightness(tmp_path: Path, top: int, suffix: str):
    grey = random_pixels((32, 32), top)
    Image.fromarray(grey).save(tmp_path / f"x.{suffix}")
    low, high = int(grey.min()), int(grey.max())
    expected = np.rint((grey.astype(float) - low) * 255 / (high - low))
    for image in (StoredImage("x", path=tmp_path / f"x.{suffix}"), StoredImage("x", pixels=grey)):
        np.testing.assert_array_equal(np.asarray(image.open("L")), expected)
        np.testing.assert_array_equal(np.asarray(image.open("RGB"))[:, :, 1], expected)
        assert image.header().deep


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_colours_keep_all_their_bits(tmp_path: Path, suffix: str):
    cv2 = pytest.importorskip("cv2")
    colours = random_pixels((9, 7, 3), 4096)  # their upper 8 bits are 0 to 15
    cv2.imwrite(str(tmp_path / f"x.{suffix}"), colours[:, :, ::-1])
    low, high = int(colours.min()), int(colours.max())
    expected = np.rint((colours.astype(float) - low) * 255 / (high - low))
    np.testing.assert_array_equal(np.asarray(StoredImage("x", path=tmp_path / f"x.{suffix}").open("RGB")), expected)


def test_every_mode_and_format_of_pillow_is_read(tmp_path: Path):
    grey = random_pixels((8, 8))
    for mode in ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"):
        Image.new(mode, (8, 6)).save(tmp_path / "x.tif")
        for wanted in ("RGB", "L", "RGBA"):
            opened = StoredImage("x", path=tmp_path / "x.tif").open(wanted)
            assert (opened.mode, opened.size) == (wanted, (8, 6)), mode
    for suffix in ("png", "bmp", "gif", "tiff", "webp", "ppm", "JPG", "JFIF", "avif", "jp2"):
        path = tmp_path / f"y.{suffix}"
        Image.fromarray(grey).convert("RGB").save(path, {"jfif": "JPEG", "jpg": "JPEG"}.get(suffix.lower()))
        pixels = np.asarray(StoredImage("y", path=path).open("L")).astype(int)
        assert np.abs(pixels - grey).mean() < 30, suffix


def test_what_is_transparent_becomes_black_as_in_the_pipeline():
    for mode, colour in (("RGBA", (255, 200, 100, 0)), ("LA", (255, 0))):
        buffer = io.BytesIO()
        Image.new(mode, (2, 2), colour).save(buffer, "PNG")
        assert StoredImage("clear", data=buffer.getvalue()).open("RGB").getpixel((0, 0)) == (0, 0, 0)
        assert StoredImage("clear", data=buffer.getvalue()).open("RGBA").getpixel((0, 0))[3] == 0


def test_arrays_of_several_shapes_and_types():
    pixels = random_pixels((6, 5, 3))
    for array in (pixels, np.moveaxis(pixels, 2, 0)):
        np.testing.assert_array_equal(np.asarray(StoredImage("x", pixels=array).open("RGB")), pixels)
    assert StoredImage("x", pixels=pixels[:, :, :1]).open("L").size == (5, 6)
    assert StoredImage("x", pixels=pixels[:, :, 0] > 9).open("L").getextrema() == (0, 255)
    shares = pixels.astype(np.float32) / 255
    scaled = np.rint((shares - shares.min()) * (255 / (shares.max() - shares.min())))
    np.testing.assert_array_equal(np.asarray(StoredImage("x", pixels=shares).open("RGB")), scaled)
    with pytest.raises(DataError, match=r"x is an array \[2, 3, 4, 5\]"):
        StoredImage("x", pixels=np.zeros((2, 3, 4, 5))).open("RGB")


def test_what_is_read_and_what_is_not_is_said(folder: Path):
    cats = folder / "pictures" / "cats"
    Image.fromarray(random_pixels()).save(cats / "named_wrong.png", "JPEG")
    Image.fromarray(random_pixels()).save(cats / "without_suffix", "PNG")
    Image.fromarray(random_pixels((9, 9), 4096)).save(cats / "deep.PNG")
    frames = [Image.fromarray(random_pixels() // n) for n in (1, 2, 3)]
    frames[0].save(cats / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(cats / "pages.tif", save_all=True, append_images=frames[1:])
    (cats / "empty.jpg").write_bytes(b"")
    (cats / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    jpeg = io.BytesIO()
    Image.fromarray(random_pixels((64, 64, 3))).save(jpeg, "JPEG")
    (cats / "cut.jpg").write_bytes(jpeg.getvalue()[:-700])
    (cats / ".hidden.png").write_bytes(png())
    (folder / "pictures" / "beside.png").write_bytes(png())
    (folder / "pictures" / "papers").mkdir()
    dataset = read(folder)
    assert len(dataset) == 3 + 3 + 5
    assert dataset.reading is not None
    said = "\n".join((*dataset.notes, *dataset.reading.notes))
    for part in (
        "cats/empty.jpg is empty", "cats/phone.heic is a HEIC image; run: pip install 'layerlens[heic]'",
        "cats/cut.jpg is damaged or truncated", "1 file not read (not an image): cats/notes.txt",
        "1 image outside the classes' folders not read: beside.png",
        "the folder papers has no images, so it is not a class", "1 image with more than 8 bits per channel",
        "cats/deep.PNG", "2 images with several frames or pages, of which only the first is read: cats/mov",
    ):  # fmt: skip
        assert part in said, part
    assert "hidden" not in said


def test_a_class_of_which_nothing_can_be_read_is_refused(folder: Path):
    (folder / "pictures" / "foxes").mkdir()
    for number in range(3):
        (folder / "pictures" / "foxes" / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    with pytest.raises(
        DataError, match=r"none of the 3 images of the class foxes can be read; foxes/0\.heic is a HEIC"
    ):
        read(folder)


def test_a_row_whose_image_cannot_be_read_is_left_out(folder: Path):
    (folder / "bad.png").write_bytes(png()[:-20])
    lines = [f'{{"image": "pictures/cats/deeper/{n}.png", "label": {n % 2}}}' for n in range(3)]
    (folder / "d.jsonl").write_text("\n".join([*lines, '{"image": "bad.png", "label": 1}']))
    dataset = read(folder, "d.jsonl")
    assert len(dataset) == 3
    assert "left out 1 of 4 rows: sample 4 has an image that is damaged or truncated" in dataset.notes[0]


def test_a_class_of_one_image_stays_a_class(tmp_path: Path):
    """A long tail: the class is named and counted, and its image is in one of the parts."""
    for kind, count in (("cat", 6), ("dog", 6), ("rare bird é", 1)):
        (tmp_path / kind).mkdir()
        for number in range(count):
            pixels = np.full((4, 4, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"a b#{number}.PNG")
    dataset = load_dataset(DataConfig(source=str(tmp_path)), task="image-classification")
    assert dataset.label_names == ("cat", "dog", "rare bird é")
    assert [dataset.labels.count(label) for label in range(3)] == [6, 6, 1]
    train, test = dataset.split_test()
    assert sorted(train.labels + test.labels) == sorted(dataset.labels)
