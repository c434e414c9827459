"""Images: where they are kept until they are needed, and how they are opened without trusting them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.data.class_folders import FileKind, class_folders, some
from layerlens.data.pixels import Header, from_array, in_mode, looks_like_image, read_header, read_pixels
from layerlens.data.rows import Reading
from layerlens.data.stored import StoredFile
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.utils.places import check_readable

LIMIT = "data.max_image_pixels"
WHOLE_BYTES = 2**26
"""Images of so many bytes are decoded when they are found; of further ones the header and the end are read."""


@dataclass(frozen=True)
class StoredImage(StoredFile):
    """An encoded image in a file or in memory, or pixels.

    Args:
        name, path, data: see ``StoredFile``.
        pixels: an array that ``data.pixels.from_array`` takes, if it is not encoded.
        max_pixels: larger images are refused before anything is decoded.
    """

    pixels: np.ndarray | None = field(default=None, repr=False)
    max_pixels: int = 2**26

    def decoded(self) -> bytes | None:
        """The pixels and their shape."""
        return None if self.pixels is None else f"{self.pixels.shape}".encode() + self.pixels.tobytes()

    def open(self, mode: str) -> Any:
        """The decoded image in PIL's ``mode`` ("RGB", "L", "RGBA"), upright and 8 bits deep; see ``data.pixels``.

        Raises:
            DataError: it is not an image, truncated, or has more than ``max_pixels``.
        """
        try:
            if self.pixels is not None:
                return in_mode(from_array(self.pixels), mode)
            return read_pixels(self._encoded, mode, self.max_pixels, LIMIT)
        except DataError as error:
            raise DataError(f"data.source: {self.name} {error}; leave it out") from error

    def header(self) -> Header:
        """What it is, without its pixels.

        Raises:
            DataError: as the end of a sentence that begins with its name.
        """
        if self.pixels is not None:
            image = from_array(self.pixels)
            return Header(image.width, image.height, self.pixels.dtype not in (bool, np.uint8))
        return read_header(self._encoded, self.max_pixels, LIMIT)

    @property
    def n_bytes(self) -> int:
        """Of the file, or of what is in memory."""
        if self.path is not None:
            return self.path.stat().st_size
        return len(self.data) if self.data is not None else 0

    @property
    def _encoded(self) -> Path | bytes:
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path


class Check(FileKind):
    """Which images can be read, one after the other; whole as long as they are not too many, else by header and end."""

    column, one, many, endings = "image", "an image", "images", ".png, .jpg, .tif"

    def __init__(self, max_pixels: int = 2**26) -> None:
        self.max_pixels = max_pixels
        self._left = WHOLE_BYTES
        self._deep: list[str] = []
        self._several: list[str] = []

    def looks_right(self, path: Path) -> bool:
        return looks_like_image(path)

    def stored(self, name: str, path: Path) -> StoredImage:
        return StoredImage(name, path=path, max_pixels=self.max_pixels)

    def fault(self, item: StoredImage) -> str:
        try:
            header = item.header()
            self._left -= item.n_bytes
            if self._left >= 0 and item.pixels is None:
                read_pixels(item._encoded, "RGB", item.max_pixels, LIMIT)
        except DataError as error:
            return str(error)
        if header.deep:
            self._deep.append(item.name)
        if header.frames > 1:
            self._several.append(item.name)
        return ""

    @property
    def notes(self) -> tuple[str, ...]:
        lines = {
            "with more than 8 bits per channel, each scaled from its darkest to its brightest value": self._deep,
            "with several frames or pages, of which only the first is read": self._several,
        }
        return tuple(
            f"{len(names)} image{'' if len(names) == 1 else 's'} {what}: {some(names)}"
            for what, names in lines.items()
            if names
        )


def image_folder(root: Path, max_pixels: int) -> tuple[tuple[StoredImage, ...], tuple[str, ...], Reading]:
    """The images below ``root``, the name of each one's class (the sub-folder it is in), and what was not read.

    Raises:
        DataError: there are fewer than two classes, or none of the images of one can be read.
    """
    return class_folders(root, Check(max_pixels))


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
