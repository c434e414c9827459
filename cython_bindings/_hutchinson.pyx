"""Hutchinson's estimate of the trace of a matrix of which only products are known (cpp/fisher/hutchinson)."""

import math
from typing import NamedTuple

from libc.stdint cimport uint64_t

import numpy as np

from layerlens.kernels._arrays cimport ArrayView, DType, view_of
from hutchinson cimport fill_rademacher, rademacher_dot


class TraceEstimate(NamedTuple):
    """What `hutchinson_trace` returns: the mean over the probes and its standard error (NaN for a single probe)."""

    trace: float
    standard_error: float
    probes: int


cdef uint64_t _unsigned(object value, str name) except? 0:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} must be between 0 and 2^64 - 1, got {value!r}")
    return <uint64_t>value


def rademacher(Py_ssize_t size, *, object seed, object probe=0, str dtype="float32") -> np.ndarray:
    """Probe number ``probe`` of ``seed``: ``size`` values +1 or -1, float32 or float64.

    A pure function of its arguments (SplitMix64 by counter): the same on every machine, and a shorter probe is the
    beginning of a longer one.

    >>> rademacher(6, seed=0).tolist()
    [-1.0, 1.0, 1.0, 1.0, -1.0, 1.0]
    """
    cdef uint64_t c_seed = _unsigned(seed, "seed"), c_probe = _unsigned(probe, "probe")
    cdef float[::1] single
    cdef double[::1] double_
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
    signs = np.empty(size, dtype=dtype)
    if size == 0:
        return signs
    if dtype == "float32":
        single = signs
        with nogil:
            fill_rademacher(c_seed, c_probe, &single[0], size)
    else:
        double_ = signs
        with nogil:
            fill_rademacher(c_seed, c_probe, &double_[0], size)
    return signs


def hutchinson_trace(
    object apply, Py_ssize_t size, *, object probes=32, object seed=0, str dtype="float32"
) -> TraceEstimate:
    """Estimate tr A of a ``size`` x ``size`` matrix from products: the mean of z . A z over ``probes`` Rademacher z.

    ``apply``: z [size] (NumPy, ``dtype``) -> A z [size], an array or CPU tensor of float32 or float64. Unbiased; for
    symmetric A the variance of one probe is 2 sum_{i != j} A_ij^2, and ``standard_error`` is estimated from the
    probes. Fixed by ``seed``. Reference: Hutchinson 1990, doi:10.1080/03610919008812866.

    Raises ValueError if ``apply`` returns another shape or there is no probe, TypeError for other element types.

    >>> hutchinson_trace(lambda z: 2.0 * z, 5, probes=4)  # no off-diagonal elements: exact
    TraceEstimate(trace=10.0, standard_error=0.0, probes=4)
    """
    cdef uint64_t c_seed = _unsigned(seed, "seed")
    cdef ArrayView view
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    values = []
    for probe in range(probes):
        product = apply(rademacher(size, seed=seed, probe=probe, dtype=dtype))
        view = view_of(product, "the result of apply")
        if view.dtype not in (DType.f32, DType.f64):
            raise TypeError(f"the result of apply must be float32 or float64, got {product.dtype}")
        if view.rank != 1 or view.shape[0] != size:
            shape = tuple([view.shape[axis] for axis in range(view.rank)])
            raise ValueError(f"apply must return shape ({size},), got {shape}")
        values.append(rademacher_dot(c_seed, probe, view.data, view.dtype, size, view.strides[0]))
    mean = math.fsum(values) / probes
    if probes == 1:
        return TraceEstimate(mean, math.nan, probes)
    variance = math.fsum((value - mean) ** 2 for value in values) / (probes - 1)
    return TraceEstimate(mean, math.sqrt(variance / probes), probes)
