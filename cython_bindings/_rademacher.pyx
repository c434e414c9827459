"""Rademacher signs from a counter-based generator (cpp/rademacher)."""

from libc.stdint cimport uint64_t

import numpy as np

from rademacher cimport fill_rademacher


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
