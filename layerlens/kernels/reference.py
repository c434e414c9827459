"""The specification of each kernel, in plain NumPy and float64. The tests compare the kernels with it.

Each function has the name and arguments of its kernel, without ``threads``. These functions copy their input and are
slow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from layerlens.kernels._moments import RowMoments, Statistics


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 numbers that are given as their bits (uint16).

    >>> widen_bfloat16(np.array([0x3F80, 0xC000], dtype=np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    return (np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def as_float64(x: Any) -> np.ndarray:
    """``x`` as a float64 array. Torch tensors convert themselves, so that this module does not import torch."""
    return x.detach().double().numpy() if hasattr(x, "detach") else np.asarray(x, dtype=np.float64)


def row_statistics(x: Any) -> Statistics:
    """Sum, sum of squares, max |x| (0 for an empty row), and counts of non-finite values and zeros, of each row.

    ``x`` is [rows, cols]. Each result is an array [rows].
    """
    values = as_float64(x)
    return Statistics(
        sum=values.sum(axis=1),
        sum_of_squares=np.square(values).sum(axis=1),
        max_abs=np.abs(values).max(axis=1, initial=0.0),
        non_finite=(~np.isfinite(values)).sum(axis=1),
        zeros=(values == 0.0).sum(axis=1),
    )


def row_moments(x: Any) -> RowMoments:
    """The first three results of `row_statistics`: sum, sum of squares and max |x| of each row."""
    return RowMoments(*row_statistics(x)[:3])


def row_sum_of_squares(x: Any) -> np.ndarray:
    """Sum of squares of each row of ``x`` [rows, cols]."""
    return row_moments(x).sum_of_squares


def gradient_energy(x: Any) -> float:
    """Sum of squares of all elements of ``x``."""
    return float(np.square(as_float64(x)).sum())


def ragged_statistics(arrays: Iterable[Any]) -> Statistics:
    """`row_statistics` of several arrays, each of them taken as one row."""
    parts = [row_statistics(as_float64(x).reshape(1, -1)) for x in arrays]
    return Statistics(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def ragged_sum_of_squares(arrays: Iterable[Any]) -> np.ndarray:
    """`gradient_energy` of each array, float64 [arrays]."""
    return np.array([gradient_energy(x) for x in arrays])


def fisher_trace(g: Any) -> float:
    """mean_n |g_n|^2 for per-sample gradients ``g`` [samples, parameters]."""
    return float(np.square(as_float64(g)).sum(axis=1).mean())


def fisher_diagonal(g: Any, out: np.ndarray | None = None, *, scale: float | None = None) -> np.ndarray:
    """Diagonal of the empirical Fisher information: mean_n g[n, p]^2, or ``scale`` times the sum over n.

    Args:
        g: per-sample gradients [samples, parameters].
        out: array [parameters], to which the result is added in place. If it is float32, the result is rounded to
            float32 first.
        scale: factor of the sum; by default 1 / samples.
    """
    values = as_float64(g)
    added = np.square(values).sum(axis=0) * (1.0 / len(values) if scale is None else scale)
    if out is None:
        return added
    out += added.astype(out.dtype)
    return out


def per_sample_gradients(inputs: Any, output_gradients: Any) -> np.ndarray:
    """Weight gradient of each sample, g_n = sum_t d_nt h_nt^T, float64 [batch, d_out * d_in].

    Args:
        inputs: h, [batch, tokens, d_in] or [batch, d_in].
        output_gradients: d, [batch, tokens, d_out] or [batch, d_out].
    """
    h, d = as_float64(inputs), as_float64(output_gradients)
    if h.ndim == 2:
        h, d = h[:, None], d[:, None]
    return np.einsum("nti,ntj->nij", d, h).reshape(len(h), -1)


def ghost_norms(inputs: Any, output_gradients: Any) -> np.ndarray:
    """Squared norm |g_n|^2 of each sample's weight gradient, float64 [batch]."""
    return np.square(per_sample_gradients(inputs, output_gradients)).sum(axis=1)


def ghost_gram(inputs: Any, output_gradients: Any) -> np.ndarray:
    """Inner products <g_n, g_m> of all pairs of samples, float64 [batch, batch]."""
    gradients = per_sample_gradients(inputs, output_gradients)
    return gradients @ gradients.T


def aggregate_scores(metrics: Mapping[str, Any], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted sum of normalised metrics, sum_m w_m x_ml / max_l |x_ml|, float64 [layers]. The weights w sum to 1."""
    total = sum(weights.values())
    score = np.zeros(len(next(iter(metrics.values()))))
    for name, values in metrics.items():
        largest = np.abs(values).max()
        if weights.get(name, 0.0) > 0.0 and largest > 0.0:
            score += weights[name] / total * (np.asarray(values) / largest)
    return score


def matrix_traces(matrices: Iterable[Any]) -> np.ndarray:
    """The trace of each square matrix."""
    return np.array([np.trace(as_float64(matrix)) for matrix in matrices])


def rademacher(size: int, *, seed: int, probe: int = 0) -> np.ndarray:
    """Random signs ±1, float64 [size], from SplitMix64.

    Bit i of word w of the stream (seed, probe) is the sign of element 64 w + i.
    """
    golden = 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    stream = mix((mix((seed + golden) % 2**64) + (probe + 1) * golden) % 2**64)
    words = [mix((stream + (word + 1) * golden) % 2**64) for word in range((size + 63) // 64)]
    return np.array([-1.0 if words[i // 64] >> (i % 64) & 1 else 1.0 for i in range(size)])


# The knapsack, in the letters and words of `cpp/include/layerlens/knapsack.hpp`: g groups, o options, r resources.
BLOCK_GROUPS = 64


def score_groups(
    offset: np.ndarray, value: np.ndarray, cost_rows: Sequence[np.ndarray], price: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The option with the highest score in each group.

    The score of an option is ((v − p0 c0) − p1 c1) − .... The first of equal options wins. Totals are summed in blocks
    of groups.

    Returns:
        choice int64 [g], score float64 [g], and totals float64 [2 + r] of score, value and the use of each resource.
    """
    score = np.array(value, dtype=np.float64)
    for p, row in zip(price, cost_rows, strict=True):
        score = score - p * row
    choice = np.array([begin + int(np.argmax(score[begin:end])) for begin, end in itertools.pairwise(offset)])
    columns = [score[choice], value[choice], *(row[choice] for row in cost_rows)]
    totals = []
    for column in columns:
        total = 0.0
        for begin in range(0, len(column), BLOCK_GROUPS):
            block = 0.0
            for amount in column[begin : begin + BLOCK_GROUPS]:
                block += float(amount)
            total += block
        totals.append(total)
    return choice, score[choice], np.array(totals)


def group_hulls(offset: np.ndarray, value: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Options on each group's upper concave hull of value over cost, in exact arithmetic: (options int64, int64 [g]).

    From the cheapest option (the best of them, the first of equals) on, as far as the value rises; points on a line
    between others are left out. The next corner is the dearer, better option with the steepest line to it.
    """
    hull, length = [], []
    for begin, end in itertools.pairwise(offset):
        points = [(Fraction(float(cost[o])), Fraction(float(value[o])), o) for o in range(begin, end)]
        corners = [min(points, key=lambda point: (point[0], -point[1], point[2]))]
        while True:
            c0, v0, _ = corners[-1]
            further = [(c, v, o) for c, v, o in points if v > v0]
            if not further:
                break
            # Of equally steep ones the farthest, so that none lies between corners; of equal points the first.
            corners.append(max(further, key=lambda point: ((point[1] - v0) / (point[0] - c0), point[0], -point[2])))
        hull += [o for _, _, o in corners]
        length.append(len(corners))
    return np.array(hull), np.array(length)


def exhaustive_optimum(
    offset: np.ndarray, value: np.ndarray, cost__ro: np.ndarray, capacity: np.ndarray
) -> tuple[float, np.ndarray] | None:
    """The largest value of all allocations that fit, and one that has it; None if none fits. All sums by fsum.

    Time grows with the product of the group sizes: for tests.
    """
    best: tuple[float, np.ndarray] | None = None
    for choice in itertools.product(*(range(begin, end) for begin, end in itertools.pairwise(offset))):
        chosen = list(choice)
        if any(math.fsum(row[chosen]) > limit for row, limit in zip(cost__ro, capacity, strict=True)):
            continue
        total = math.fsum(value[chosen])
        if best is None or total > best[0]:
            best = total, np.array(chosen)
    return best
