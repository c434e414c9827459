"""Real labelled images that come with scikit-learn: 1,797 handwritten digits, 8 × 8 pixels (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

import numpy as np

from layerlens.data.dataset import Dataset
from layerlens.data.images import StoredImage
from layerlens.exceptions import DataError

BRIGHTEST = 16
"""scikit-learn's pixels are counts from 0 to 16."""


def digits() -> Dataset:
    """The digits as uint8 images, in scikit-learn's order.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError("data.source: builtin:digits needs scikit-learn; run: pip install scikit-learn") from error
    found = load_digits()
    pixels = np.rint(found.images * (255 / BRIGHTEST)).astype(np.uint8)
    images = tuple(StoredImage(f"digit {index}", pixels=image) for index, image in enumerate(pixels))
    names = tuple(str(name) for name in found.target_names)
    return Dataset({"image": images}, tuple(map(int, found.target)), names, "handwritten digits of scikit-learn")
