"""Images: where they are kept until they are needed, and how they are opened without trusting them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.data.pixels import Header, from_array, in_mode, looks_like_image, read_header, read_pixels
from layerlens.data.rows import MOST_NAMED, Reading
from layerlens.exceptions import DataError, DataNotFoundError
from layerlens.utils.places import check_readable

LIMIT = "data.max_image_pixels"
WHOLE_BYTES = 2**26
"""Images of so many bytes are decoded when they are found; of further ones the header and the end are read."""


@dataclass(frozen=True)
class StoredImage:
    """An encoded image in a file or in memory, or pixels.

    Args:
        name: what messages call it, and what splits tell it apart by.
        path: the file, if there is one.
        data: the encoded bytes, if there is no file.
        pixels: an array that ``data.pixels.from_array`` takes, if it is not encoded.
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
        """The decoded image in PIL's ``mode`` ("RGB", "L", "RGBA"), upright and 8 bits deep; see ``data.pixels``.

        Raises:
            DataError: it is no image, truncated, or has more than ``max_pixels``.
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


class Check:
    """Which images can be read, one after the other; whole as long as they are not too many, else by header and end.

    Attributes:
        notes: what becomes of those that can be read, a line each.
    """

    def __init__(self) -> None:
        self._left = WHOLE_BYTES
        self._deep: list[str] = []
        self._several: list[str] = []

    def fault(self, image: StoredImage) -> str:
        """Why an image cannot be read, as the end of a sentence; "" where it can."""
        try:
            header = image.header()
            self._left -= image.n_bytes
            if self._left >= 0 and image.pixels is None:
                read_pixels(image._encoded, "RGB", image.max_pixels, LIMIT)
        except DataError as error:
            return str(error)
        if header.deep:
            self._deep.append(image.name)
        if header.frames > 1:
            self._several.append(image.name)
        return ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of those that can be read."""
        lines = {
            "with more than 8 bits a channel, scaled from the darkest to the brightest value of each": self._deep,
            "with several frames or pages, of which the first is read": self._several,
        }
        return tuple(f"{_count(names, 'image')} {what}: {some(names)}" for what, names in lines.items() if names)


def some(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def image_folder(root: Path, max_pixels: int) -> tuple[tuple[StoredImage, ...], tuple[str, ...], Reading]:
    """The images below ``root``, the name of each one's class (the sub-folder it is in), and what was not read.

    Raises:
        DataError: images stand outside the classes' folders, there are fewer than two classes, or none of the images of
            one can be read.
    """
    classes = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    images: list[StoredImage] = []
    labels: list[str] = []
    left_out: dict[int, str] = {}
    names: dict[int, str] = {}
    notes: list[str] = []
    check = Check()
    for folder in classes:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
        found = [path for path in paths if looks_like_image(path)]
        if len(found) < len(paths):
            others = [path.relative_to(root).as_posix() for path in paths if path not in set(found)]
            notes.append(f"{_count(others, 'file')} not read, since not an image: {some(others)}")
        if not found:
            notes.append(f"the folder {folder.name} has no images, so it is no class")
        faults: list[str] = []
        for path in found:
            check_readable(path, root)
            image = StoredImage(path.relative_to(root).as_posix(), path=path, max_pixels=max_pixels)
            fault = check.fault(image)
            if fault:
                number = len(images) + len(left_out) + 1
                left_out[number], names[number] = fault, image.name
                faults.append(fault)
            else:
                images.append(image)
                labels.append(folder.name)
        if found and len(faults) == len(found):
            raise DataError(
                f"data.source: none of the {len(found)} images of the class {folder.name} can be read; "
                f"{found[0].relative_to(root)} {faults[0]}; or move the folder away if it is no class"
            )
    outside = [path.name for path in sorted(root.iterdir()) if path.is_file() and looks_like_image(path)]
    if len(set(labels)) < 2:
        known = f"has images of {len(set(labels))} class" if labels else "has no images in sub-folders"
        raise DataError(
            f"data.source: {root} {known}; an image folder has one sub-folder for each of two or more classes "
            "(.png, .jpg, .tif ...). If it has train and test folders, give the train folder"
        )
    if outside:
        notes.append(f"{_count(outside, 'image')} outside the classes' folders not read: {some(outside)}")
    total = len(images) + len(left_out)
    reading = Reading(total, ("image",), left_out=left_out, names=names, notes=(*notes, *check.notes))
    return tuple(images), tuple(labels), reading


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


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
