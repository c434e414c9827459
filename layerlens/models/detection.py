"""What a detector found in an image, and images of which it is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""


@dataclass(frozen=True)
class Detection:
    """One box.

    Args:
        label: name of the class.
        confidence: between 0 and 1, as the detector gives it; not calibrated.
        box: in pixels of the image as loaded.
    """

    label: str
    confidence: float
    box: Box


@dataclass(frozen=True)
class LabelledImage:
    """A picture and everything that a detector should find in it.

    Args:
        pixels: uint8, [height, width] grey or [height, width, 3] RGB.
        labels: class index of every object.
        boxes: box of every object.
    """

    pixels: np.ndarray
    labels: tuple[int, ...]
    boxes: tuple[Box, ...]
