"""Images: where they are kept until they are needed, and how they are opened without trusting them."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.utils.places import check_readable

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class StoredImage:
    """An encoded image in a file or in memory, or pixels.

    Args:
        name: what messages call it, and what splits tell it apart by.
        path: the file, if there is one.
        data: the encoded bytes, if there is no file.
        pixels: uint8 [height, width] or [height, width, 3], if it is not encoded.
        max_pixels: larger images are refused before anything is decoded.
    """

    name: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    pixels: np.ndarray | None = field(default=None, repr=False)
    max_pixels: int = 2**26

    @property
    def identity(self) -> str:
        """The name of a file, the content of anything else."""
        return self.name if self.path is not None else hashlib.sha256(self.content()).hexdigest()

    def content(self) -> bytes:
        """The encoded bytes, or the pixels and their shape.

        Raises:
            DataError: the file cannot be read.
        """
        if self.pixels is not None:
            return f"{self.pixels.shape}".encode() + self.pixels.tobytes()
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"data.source: cannot read {self.name}: {error.strerror or error}") from error

    def open(self, mode: str) -> Any:
        """The decoded image in PIL's ``mode`` ("RGB", "L"), turned as its camera says.

        Raises:
            DataError: it is no image, truncated, or has more than ``max_pixels``.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        if self.pixels is not None:
            return Image.fromarray(self.pixels).convert(mode)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(self.content()))
                width, height = image.size
                if width * height > self.max_pixels:
                    raise DataError(
                        f"data.source: {self.name} has {width} × {height} pixels, more than the {self.max_pixels:,} of "
                        "data.max_image_pixels; scale it down, or raise the limit if you trust the file"
                    )
                return ImageOps.exif_transpose(image).convert(mode)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"data.source: {self.name}: {error}; scale it down") from error
        except UnidentifiedImageError as error:
            raise DataError(f"data.source: {self.name} is not an image that PIL can read; convert it to PNG") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"data.source: {self.name} is damaged or truncated: {error}; leave it out") from error


def image_folder(root: Path, max_pixels: int) -> tuple[tuple[StoredImage, ...], tuple[str, ...]]:
    """The images below ``root`` and the name of each one's class: the sub-folder it is in.

    Raises:
        DataError: images stand outside the classes' folders, or there are fewer than two classes.
    """
    classes = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    images: list[StoredImage] = []
    labels: list[str] = []
    for folder in classes:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        for path in paths:
            check_readable(path, root)
            images.append(StoredImage(path.relative_to(root).as_posix(), path=path, max_pixels=max_pixels))
            labels.append(folder.name)
    if len(set(labels)) < 2:
        found = f"has images of {len(set(labels))} class" if labels else "has no images in sub-folders"
        raise DataError(
            f"data.source: {root} {found}; an image folder has one sub-folder for each of two or more classes "
            f"({', '.join(SUFFIXES[:3])} ...). If it has train and test folders, give the train folder"
        )
    return tuple(images), tuple(labels)


def stored_image(value: Any, place: Path, number: int, max_pixels: int) -> StoredImage | None:
    """The image that a row holds: a path (relative ones from the table's folder), bytes as ``datasets`` keeps them, or
    pixels.

    None where the value is nothing of the kind.

    Raises:
        DataNotFoundError: there is no such file.
    """
    name = f"image of sample {number}"
    if isinstance(value, np.ndarray):
        return StoredImage(name, pixels=value)
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return StoredImage(value.get("path") or name, data=value["bytes"], max_pixels=max_pixels)
    if isinstance(value, bytes):
        return StoredImage(name, data=value, max_pixels=max_pixels)
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value:
        return None
    path = place.parent / Path(value).expanduser()
    check_readable(path, place)
    if not path.is_file():
        raise DataNotFoundError(f"has no image file at {path}")
    return StoredImage(value, path=path, max_pixels=max_pixels)
