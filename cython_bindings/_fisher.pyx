"""Trace and diagonal of the empirical Fisher information from per-sample gradients (cpp/fisher)."""

import math

import numpy as np

from layerlens.kernels._arrays cimport ArrayView, DType, MatrixView, item_size, matrix_of, view_of
from layerlens.kernels._dispatch cimport Isa, active_isa, usable_threads
from fisher cimport add_column_sum_of_squares, c_fisher_trace


cdef ArrayView _gradients(object g):
    cdef ArrayView view = matrix_of(g, "g", "samples, parameters")
    if view.shape[0] == 0:
        raise ValueError(f"g has shape (0, {view.shape[1]}): a mean over samples needs at least one")
    return view


def fisher_trace(object g, *, object threads=1) -> float:
    """mean_n |g_n|^2, the trace of the empirical Fisher, from per-sample gradients ``g`` [samples, parameters].

    ``g``: float32, float64, bfloat16 or float16; NumPy array, buffer or CPU tensor, any strides, never copied.
    Bitwise the same for any number of ``threads``; relative error as `row_moments`.

    Raises TypeError for other element types, objects and devices, ValueError for other ranks and for no samples.

    >>> import numpy as np
    >>> fisher_trace(np.array([[1.0, 2.0], [3.0, 4.0]]))
    15.0
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView view = _gradients(g)
    cdef MatrixView matrix = view.matrix()
    cdef double trace = 0.0
    if matrix.cols:
        with nogil:
            trace = c_fisher_trace(<Isa>isa, matrix, workers)
    return trace


def fisher_diagonal(object g, object out=None, *, object scale=None, object threads=1) -> np.ndarray:
    """Add the diagonal of the empirical Fisher, mean_n g[n, p]^2, to ``out`` [parameters] and return it.

    ``g`` [samples, parameters]: as for `fisher_trace`. ``out``: contiguous writable float64 or float32 [parameters],
    float64 zeros if not given; it is changed in place. ``scale`` replaces the 1/samples by which the sum over these samples is multiplied:
    over several batches pass 1/(samples of all batches).

    Sums run over samples in float64, where squares of 32- and 16-bit values are exact: relative error at most
    (samples + 3) * 2^-53. To a float32 ``out`` each call adds its float64 result rounded to float32: from zeros, K calls
    add at most K * 2^-24 to the relative error (of values above 2^-126), and one float32 sample moves 12 bytes per
    parameter instead of 20. Bitwise the same for any number of ``threads``.

    Raises TypeError and ValueError as `fisher_trace`, and for an ``out`` that cannot be written in place.

    >>> import numpy as np
    >>> fisher_diagonal(np.array([[1.0, 2.0], [3.0, 4.0]]))
    array([ 5., 10.])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView view = _gradients(g), target
    cdef MatrixView matrix = view.matrix()
    cdef double factor = 1.0 / matrix.rows if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale must be finite, got {scale!r}")
    if out is None:
        out = np.zeros(matrix.cols)
    target = _output(out, matrix.cols)
    if _overlap(view, target):
        raise ValueError("out shares memory with g: it would change while g is read")
    if matrix.cols:
        with nogil:
            add_column_sum_of_squares(<Isa>isa, matrix, factor, target.dtype, target.data, workers)
    return out


cdef ArrayView _output(object out, Py_ssize_t cols):
    cdef ArrayView view = view_of(out, "out")
    if view.dtype != DType.f64 and view.dtype != DType.f32:
        raise TypeError(f"out must be float64 or float32, got {getattr(out, 'dtype', type(out).__name__)}")
    if view.rank != 1 or view.shape[0] != cols:
        shape = tuple([view.shape[axis] for axis in range(view.rank)])
        raise ValueError(f"out must have shape ({cols},), one value per column of g, got {shape}")
    if cols > 1 and view.strides[0] != item_size(view.dtype):
        raise ValueError(f"out must be contiguous, got a stride of {view.strides[0]} bytes: pass a new array and copy")
    if view.read_only:
        raise ValueError("out is read-only: pass a writable array, or none to get a new one")
    return view


cdef bint _overlap(ArrayView g, ArrayView out):
    cdef char* first = g.data
    cdef char* last = g.data + item_size(g.dtype)
    cdef int axis
    if g.size() == 0 or out.size() == 0:
        return False
    for axis in range(g.rank):
        if g.strides[axis] < 0:
            first += (g.shape[axis] - 1) * g.strides[axis]
        else:
            last += (g.shape[axis] - 1) * g.strides[axis]
    return first < out.data + out.shape[0] * item_size(out.dtype) and out.data < last
