"""Images on their way in and out: found, loaded (a broken one gives a one-line error, before much memory is used),
and with their boxes drawn on them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from layerlens.data.pixels import SUFFIXES, looks_like_image, read_pixels
from layerlens.exceptions import DataNotFoundError
from layerlens.models import Detection


def find_images(sources: Sequence[str], base_dir: Path | None = None) -> list[Path]:
    """The files that ``sources`` mean, each once, in the order given and by name within a folder or pattern.

    Args:
        sources: files, folders (their images, without subfolders), or patterns such as ``scans/**/*.png``.
        base_dir: where relative ones start; the working directory when None.

    Raises:
        DataNotFoundError: a source is not there, or has no image in it.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = (base_dir or Path()) / Path(source).expanduser()
        if path.is_dir():
            files = sorted(entry for entry in path.iterdir() if entry.is_file() and looks_like_image(entry))
            if not files:
                raise DataNotFoundError(f"images: no image in the folder {path} ({', '.join(sorted(SUFFIXES))})")
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
            if not files:
                raise DataNotFoundError(f"images: nothing at {path}; give image files, folders or patterns")
        found.update(dict.fromkeys(files))
    return list(found)


def load_image(path: Path, max_megapixels: float) -> Image.Image:
    """The image in mode RGB, upright and 8 bits deep; see ``layerlens.data.pixels``.

    Args:
        path: the file.
        max_megapixels: more are refused when the header is read, before the pixels are decoded.

    Raises:
        DataError: it cannot be read, is not an image, is truncated, or is too large.
    """
    image: Image.Image = read_pixels(path, "RGB", round(max_megapixels * 1e6), "max_megapixels")
    return image


# Bright hues that stay apart for people who see red and green alike (after Okabe and Ito), on dark and light images.
COLOURS = ("#56B4E9", "#E69F00", "#00C08B", "#F0E442", "#FF7F50", "#CC79A7", "#3D8BFF")
SMALLEST = 480
"""Smaller images are enlarged by a whole number, so that labels can be read."""


def annotate(image: Image.Image, detections: Sequence[Detection], names: Sequence[str]) -> Image.Image:
    """``image`` in RGB with every box, its label and its confidence.

    Args:
        image: as loaded.
        detections: boxes in its pixels.
        names: all classes of the detector; the place of a name decides its colour.
    """
    scale = max(1, -(-SMALLEST // max(image.size)))
    shown = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(shown)
    unit = max(shown.size)
    width, font = max(2, unit // 320), ImageFont.load_default(size=max(12, unit // 36))
    for detection in reversed(detections):  # the best on top
        colour = COLOURS[names.index(detection.label) % len(COLOURS)] if detection.label in names else COLOURS[0]
        box = [scale * value for value in detection.box]
        draw.rectangle(box, outline=colour, width=width)
        text = f"{detection.label} {detection.confidence:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        high, wide = bottom - top + 6, right - left + 8
        y = box[1] - high if box[1] >= high else min(box[3], shown.height - high)
        x = max(0, min(box[0], shown.width - wide))
        draw.rectangle((x, y, x + wide, y + high), fill=colour)
        draw.text((x + 4 - left, y + 3 - top), text, fill="black", font=font)
    return shown
