"""What each kernel computes, in plain NumPy and float64: the specification that the kernels are tested against.

Each function has the name and arguments of its kernel, less ``threads``. They copy, they are slow, and they are short.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from layerlens.kernels._moments import RowMoments, Statistics


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values whose upper halves are ``bits`` (uint16): what a bfloat16 means.

    >>> widen_bfloat16(np.array([0x3F80, 0xC000], dtype=np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    return (np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def as_float64(x: Any) -> np.ndarray:
    """``x`` as a float64 array; torch tensors are asked to convert themselves, so that torch is not imported here."""
    return x.detach().double().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)


def row_statistics(x: Any) -> Statistics:
    """Sum, sum of squares, max |x| (0 of no elements), non-finite and zero counts of each row of ``x`` [rows, cols]."""
    values = as_float64(x)
    return Statistics(
        sum=values.sum(axis=1),
        sum_of_squares=np.square(values).sum(axis=1),
        max_abs=np.abs(values).max(axis=1, initial=0.0),
        non_finite=(~np.isfinite(values)).sum(axis=1),
        zeros=(values == 0.0).sum(axis=1),
    )


def row_moments(x: Any) -> RowMoments:
    """The first three of `row_statistics`."""
    return RowMoments(*row_statistics(x)[:3])


def row_sum_of_squares(x: Any) -> np.ndarray:
    """Sum of squares of each row of ``x`` [rows, cols]."""
    return row_moments(x).sum_of_squares


def gradient_energy(x: Any) -> float:
    """Sum of squares of all elements of ``x``."""
    return float(np.square(as_float64(x)).sum())


def ragged_statistics(arrays: Iterable[Any]) -> Statistics:
    """`row_statistics` of each array as if it were one row."""
    parts = [row_statistics(as_float64(x).reshape(1, -1)) for x in arrays]
    return Statistics(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def ragged_sum_of_squares(arrays: Iterable[Any]) -> np.ndarray:
    """`gradient_energy` of each array."""
    return np.array([gradient_energy(x) for x in arrays])


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


def per_sample_gradients(inputs: Any, output_gradients: Any) -> np.ndarray:
    """g_n = sum_t d_nt h_nt^T [batch, d_out * d_in], from [batch, tokens, features] or [batch, features] (one token)."""
    h, d = as_float64(inputs), as_float64(output_gradients)
    if h.ndim == 2:
        h, d = h[:, None], d[:, None]
    return np.einsum("nti,ntj->nij", d, h).reshape(len(h), -1)


def ghost_norms(inputs: Any, output_gradients: Any) -> np.ndarray:
    """|g_n|^2 of each sample's weight gradient, [batch]."""
    return np.square(per_sample_gradients(inputs, output_gradients)).sum(axis=1)


def ghost_gram(inputs: Any, output_gradients: Any) -> np.ndarray:
    """<g_n, g_m> of all pairs of samples, [batch, batch]."""
    gradients = per_sample_gradients(inputs, output_gradients)
    return gradients @ gradients.T
