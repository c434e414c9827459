"""Test matrices in every element type that the kernels read, and the error bounds that the kernels promise."""

from __future__ import annotations

import math

import numpy as np
import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Around the widths of the registers (4, 8, 16), of a step (32 in float64, else 64), of the flush (512) and of the
# chunk (32768).
AWKWARD_LENGTHS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 511, 512, 513, 1000, 32767, 32768, 32769)


def matrix(rows: int, cols: int, dtype: str, seed: int = 0) -> torch.Tensor:
    """Values of mixed sign with magnitudes from 1e-3 to 1e3, so that no term is negligible or dominates alone."""
    generator = np.random.default_rng([seed, rows, cols])
    values = generator.standard_normal((rows, cols)) * 10.0 ** generator.uniform(-3, 3, (rows, cols))
    return torch.from_numpy(values).to(DTYPES[dtype])


def relative_bound(dtype: str, cols: int) -> float:
    """Bound of the relative error of a row's sum of squares, and of its sum relative to the sum of |x|.

    float32, bfloat16, float16: u = 2^-24. One rounding for the square, at most 7 additions in a lane before it is
    flushed (8 terms), 2 additions that fold 64 lanes into 16: 10 u. Everything after that is float64, and squares
    rounded as subnormals add at most 2^-30.
    float64: u = 2^-53. One for the square, then the longest chain of additions: 32768 / 32 steps of a lane, 2 + 3 to
    fold 32 lanes into one, and the tree over the chunks.
    """
    chunks = max(1, math.ceil(cols / 32768))
    wide = (1 + 32768 / 32 + 5 + math.ceil(math.log2(chunks) if chunks > 1 else 0)) * 2.0**-53
    return wide if dtype == "float64" else 10 * 2.0**-24 + 2.0**-30 + wide


def bits(*arrays: np.ndarray | float) -> bytes:
    """The bytes of some results, to compare them for bitwise equality."""
    return b"".join(np.asarray(array, dtype=np.float64).tobytes() for array in arrays)
