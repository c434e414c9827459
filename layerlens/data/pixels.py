"""The one reader of images: what an encoded image is, what is wrong with it, and its pixels, 8 bits deep and upright.

Every image goes this way, whether a model is measured or trained on it or the pipeline reports on it:

* more than 8 bits a channel (12 and 16 bits of X-rays and microscopes, float) are scaled from the darkest to the
  brightest value of the image, since nothing in the file says which values were possible;
* transparent parts become black, not what a palette or an editor hides there;
* of several frames or pages the first is read;
* the camera's orientation is followed.

What cannot be read is said as the end of a sentence that begins with the file's name.
"""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.exceptions import DataError

HEIC = frozenset((".heic", ".heif", ".hif"))
SUFFIXES = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif",
     ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", *HEIC)
)  # fmt: skip
"""What files of images are called, in lower case."""
SIGNATURES = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
)  # fmt: skip
BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
"""Of ISO media files, those that hold images."""
NO_HEIC = "is a HEIC image; run: pip install 'layerlens[heic]' (pillow-heif), or convert it to JPEG"
ENDINGS = {"JPEG": (b"\xff\xd9", 4096), "PNG": (b"IEND\xaeB`\x82", 4096), "GIF": (b"\x3b", 64)}
"""Format -> the bytes that a whole file ends with, and within how many of the last ones they stand."""
DEEP = ";16"
BLACK = (0, 0, 0, 255)
ORIENTATION = 274
"""The tag of Exif that says how a camera was held."""
ACROSS = (5, 6, 7, 8)
"""Orientations whose stored width is the height of the upright image; the others below are of the axes after that."""
MIRRORED_DOWN, MIRRORED_ACROSS = (3, 4, 7, 8), (2, 3, 6, 7)


@dataclass(frozen=True)
class Header:
    """What the header of an image says.

    Args:
        width, height: in pixels, of the upright image.
        deep: it has more than 8 bits a channel.
        frames: frames or pages.
        orientation: how the pixels are stored, 1 (upright) to 8 as Exif numbers them.
    """

    width: int
    height: int
    deep: bool = False
    frames: int = 1
    orientation: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height of the pixels as they are stored."""
        return (self.height, self.width) if self.orientation in ACROSS else (self.width, self.height)


def looks_like_image(path: Path) -> bool:
    """Whether a file is called as images are, or begins as they do, whatever it is called."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return False
    of_riff = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return start.startswith(SIGNATURES) or of_riff or (start[4:8] == b"ftyp" and start[8:12] in BRANDS)


def read_header(data: Path | bytes, max_pixels: int, limit: str) -> Header:
    """The header of an encoded image, and whether the file goes on to its end; no pixel is decoded.

    Args:
        data: a file, or what is in one.
        max_pixels: larger ones are refused.
        limit: the setting that says so, for the message.

    Raises:
        DataError: it cannot be read.
    """
    with _reading(data) as image:
        _check_size(image, max_pixels, limit)
        _check_end(image, data)
        frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "TIFF", "WEBP", "PNG", "AVIF") else 1
        orientation = _orientation(image)
        size = (image.height, image.width) if orientation in ACROSS else (image.width, image.height)
        return Header(*size, _is_deep(image), int(frames), orientation)


def read_pixels(data: Path | bytes, mode: str, max_pixels: int, limit: str) -> Any:
    """An encoded image in PIL's ``mode`` ("RGB", "L", "RGBA"), as this module says.

    Args:
        data, max_pixels, limit: see ``read_header``.
        mode: of the result.

    Raises:
        DataError: it cannot be read.
    """
    from PIL import ImageOps

    with _reading(data) as image:
        _check_size(image, max_pixels, limit)
        if DEEP in _raw_mode(image):
            values = _deep_colours(image, data)
            if values is not None:
                return in_mode(_from_array(upright(_scaled(values), _orientation(image))), mode)
        image.load()
        return in_mode(ImageOps.exif_transpose(image), mode)


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [height, width, ...] that were stored in an orientation of Exif, turned upright."""
    if orientation in ACROSS:
        values = values.swapaxes(0, 1)
    return values[:: -1 if orientation in MIRRORED_DOWN else 1, :: -1 if orientation in MIRRORED_ACROSS else 1]


def upright_box(box: tuple[float, float, float, float], orientation: int) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom, in shares of the stored pixels) in shares of the upright image."""
    left, top, right, bottom = box
    if orientation in ACROSS:
        left, top, right, bottom = top, left, bottom, right
    if orientation in MIRRORED_DOWN:
        top, bottom = 1.0 - bottom, 1.0 - top
    if orientation in MIRRORED_ACROSS:
        left, right = 1.0 - right, 1.0 - left
    return left, top, right, bottom


def _orientation(image: Any) -> int:
    """1 where the image says nothing, or nothing of Exif."""
    found = image.getexif().get(ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def from_array(pixels: np.ndarray) -> Any:
    """An image from an array [height, width], [height, width, 1 to 4] or [1, 3 or 4, height, width without 1].

    Numbers that are not uint8 or bool are scaled as those of an image with more than 8 bits a channel.

    Raises:
        DataError: it has another shape.
    """
    values = np.asarray(pixels)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 2, 3, 4):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (2, 3, 4)) or not values.size:
        raise DataError(f"is an array {list(np.shape(pixels))}; an image is [height, width] or [height, width, 3]")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    return _from_array(values if values.dtype == np.uint8 else _scaled(values))


def in_mode(image: Any, mode: str) -> Any:
    """An image of any of PIL's modes in this one."""
    from PIL import Image

    if image.mode == mode:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_scaled(np.asarray(image)))
    if image.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    transparent = image.mode in ("RGBA", "LA", "PA", "P") or "transparency" in image.info
    if transparent and mode != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BLACK), image).convert("RGB")
    return image.convert(mode)


class _reading:
    """The opened image; whatever Pillow raises for an unreadable file becomes a one-line error."""

    def __init__(self, data: Path | bytes) -> None:
        self.data = data
        self.image: Any = None

    def __enter__(self) -> Any:
        try:
            return self._open()
        except Exception as error:
            raise _said(error, self.data) from error

    def _open(self) -> Any:
        from PIL import Image

        if not _size_of(self.data):
            raise DataError("is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is the caller's own
            _with_heic()
            source: Any = io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data
            self.image = Image.open(source)
        return self.image

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.image is not None:
            self.image.close()
        if isinstance(error, Exception):
            raise _said(error, self.data) from error


def _said(error: Exception, data: Path | bytes) -> DataError:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, DataError):
        return error
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return DataError(f"is refused as a decompression bomb: {error}")
    if isinstance(error, UnidentifiedImageError):
        return DataError(NO_HEIC if _is_heic(data) else "is not an image that Pillow can read; convert it to PNG")
    if isinstance(error, ImportError):  # ultralytics tries a reader for HEIF that may not be there
        return DataError(NO_HEIC if _is_heic(data) else f"needs a package that is not installed: {error}")
    if isinstance(error, MemoryError):
        return DataError("is too large for the memory; scale it down, or lower the limit of pixels")
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return DataError(f"cannot be read: {error.strerror}")
    return DataError(f"is damaged or truncated: {' '.join(str(error).split()) or type(error).__name__}")


def _check_size(image: Any, max_pixels: int, limit: str) -> None:
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise DataError(
            f"has {image.width} × {image.height} pixels ({pixels / 1e6:.3g} megapixels), more than the {max_pixels:,} "
            f"of {limit}; scale it down, or raise the limit if you trust the file"
        )


def _check_end(image: Any, data: Path | bytes) -> None:
    """Refuse a file that ends before its image does, as far as its last bytes tell."""
    if image.format not in ENDINGS:
        return
    ending, within = ENDINGS[image.format]
    if isinstance(data, bytes):
        last = data[-within:]
    else:
        with data.open("rb") as file:
            file.seek(max(0, _size_of(data) - within))
            last = file.read()
    # Some cameras and editors write more after the end: megabytes of another picture, which decoding does not mind.
    if ending not in last and not _decodes(image):
        raise DataError(f"is damaged or truncated: a {image.format} that ends early")


def _decodes(image: Any) -> bool:
    try:
        image.copy().load()
    except Exception:  # whatever Pillow raises for a damaged file
        return False
    return True


def _size_of(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def _is_heic(data: Path | bytes) -> bool:
    if isinstance(data, bytes):
        start = data[:12]
    else:
        with data.open("rb") as file:
            start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:12] in BRANDS[2:]


@functools.cache
def _with_heic() -> None:
    """Let Pillow read HEIC where pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _raw_mode(image: Any) -> str:
    """How the pixels lie in the file, as Pillow calls it: "RGB;16B"; "" where nothing says so."""
    tiles = getattr(image, "tile", None) or ()
    args = tiles[0][3] if tiles and len(tiles[0]) > 3 else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _is_deep(image: Any) -> bool:
    return image.mode.startswith("I") or image.mode == "F" or DEEP in _raw_mode(image)


def _deep_colours(image: Any, data: Path | bytes) -> np.ndarray | None:
    """All 16 bits of colours, of which Pillow reads the upper 8: the lower 8 are what it reads in the other order of
    bytes. None where they cannot be had, so that the upper 8 have to do.
    """
    from PIL import Image

    raw = _raw_mode(image)
    other = {"B": "L", "L": "B", "N": "B"}.get(raw[-1:])
    if image.mode not in ("RGB", "RGBA", "LA") or other is None:
        return None
    try:
        source: Any = io.BytesIO(data) if isinstance(data, bytes) else data
        with Image.open(source) as low:
            low.tile = [_with_raw_mode(tile, f"{raw[:-1]}{other}") for tile in low.tile]
            lower = np.asarray(low, dtype=np.uint16)
        upper = np.asarray(image, dtype=np.uint16)
    except (ValueError, OSError, TypeError):
        return None
    return upper * 256 + lower if lower.shape == upper.shape else None


def _with_raw_mode(tile: Any, raw: str) -> Any:
    args = tile[3]
    return type(tile)(*tile[:3], (raw, *args[1:]) if isinstance(args, tuple) else raw)


def _scaled(values: np.ndarray) -> np.ndarray:
    """uint8 from the darkest to the brightest finite value; an alpha channel from 0 to its own largest."""
    numbers = values.astype(np.float64)
    alpha = None
    if numbers.ndim == 3 and numbers.shape[2] in (2, 4):
        numbers, alpha = numbers[:, :, :-1], numbers[:, :, -1:]
        alpha = alpha * (255.0 / max(float(alpha.max()), 1e-300))
    finite = np.isfinite(numbers)
    if not finite.any():
        raise DataError("has no finite number")
    low, high = float(numbers[finite].min()), float(numbers[finite].max())
    numbers = np.clip(np.nan_to_num(numbers, nan=low, posinf=high, neginf=low), low, high)
    scaled = (numbers - low) * (255.0 / (high - low)) if high > low else np.zeros_like(numbers)
    found = scaled if alpha is None else np.concatenate([scaled, alpha], axis=2)
    return found.round().astype(np.uint8)


def _from_array(values: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(values))
