"""What each kernel computes, in plain NumPy and float64: the specification that the kernels are tested against.

Each function has the name and arguments of its kernel, less ``threads``. They copy, they are slow, and they are short.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from layerlens.kernels._moments import RowMoments


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values whose upper halves are ``bits`` (uint16): what a bfloat16 means.

    >>> widen_bfloat16(np.array([0x3F80, 0xC000], dtype=np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    return (np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def as_float64(x: Any) -> np.ndarray:
    """``x`` as a float64 array; torch tensors are asked to convert themselves, so that torch is not imported here."""
    return x.detach().double().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)


def row_moments(x: Any) -> RowMoments:
    """Sum, sum of squares and max |x| of each row of ``x`` [rows, cols]; the maximum of an empty row is 0."""
    values = as_float64(x)
    return RowMoments(
        sum=values.sum(axis=1),
        sum_of_squares=np.square(values).sum(axis=1),
        max_abs=np.abs(values).max(axis=1, initial=0.0),
    )


def row_sum_of_squares(x: Any) -> np.ndarray:
    """Sum of squares of each row of ``x`` [rows, cols]."""
    return row_moments(x).sum_of_squares


def gradient_energy(x: Any) -> float:
    """Sum of squares of all elements of ``x``."""
    return float(np.square(as_float64(x)).sum())


def fisher_trace(g: Any) -> float:
    """mean_n |g_n|^2 for per-sample gradients ``g`` [samples, parameters]."""
    return float(np.square(as_float64(g)).sum(axis=1).mean())


def fisher_diagonal(g: Any, out: np.ndarray | None = None, *, scale: float | None = None) -> np.ndarray:
    """``out`` + mean_n g[n, p]^2 (or + ``scale`` times the sum), in place if ``out`` is given."""
    values = as_float64(g)
    added = np.square(values).sum(axis=0) * (1.0 / len(values) if scale is None else scale)
    if out is None:
        return added
    out += added
    return out
