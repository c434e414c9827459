"""Row-wise sums, sums of squares and largest magnitudes, and the energy of whole arrays (cpp/moments)."""

from typing import NamedTuple

import numpy as np

from layerlens.kernels._arrays cimport ArrayView, MatrixView, matrix_of, view_of
from layerlens.kernels._dispatch cimport Isa, active_isa, usable_threads

cdef extern from "layerlens/moments.hpp" namespace "layerlens" nogil:
    void c_row_moments "layerlens::row_moments"(
        Isa isa, const MatrixView& x, double* sum, double* sum_of_squares, double* max_abs, int threads) except +
    void c_row_sum_of_squares "layerlens::row_sum_of_squares"(
        Isa isa, const MatrixView& x, double* out, int threads) except +
    double c_sum_of_squares "layerlens::sum_of_squares"(Isa isa, const MatrixView& x, int threads) except +
    double tree_sum(double* values, Py_ssize_t n)


class RowMoments(NamedTuple):
    """What `row_moments` returns: three float64 arrays [rows]."""

    sum: np.ndarray
    sum_of_squares: np.ndarray
    max_abs: np.ndarray


def row_moments(object x, *, object threads=1) -> RowMoments:
    """Sum, sum of squares and max |x| of each row of ``x`` [rows, cols], in one read.

    ``x``: float32, float64, bfloat16 or float16; NumPy array, buffer or CPU tensor, any strides, never copied.
    ``threads``: how many threads may work; the result is bitwise the same for any number.

    Returns float64 arrays [rows]. The relative error of a sum of squares, and of a sum relative to the sum of |x|, is
    below 6e-7 for 32- and 16-bit input of any length, and below cols * 1e-16 for float64. ``max_abs`` is exact: NaN if
    the row holds one, 0 if it is empty.

    Raises TypeError for other element types, objects and devices, ValueError if ``x`` has not two axes.

    >>> import numpy as np
    >>> row_moments(np.array([[3.0, -4.0], [0.0, 1.0]])).sum_of_squares
    array([25.,  1.])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView view = matrix_of(x, "x", "rows, cols")
    cdef MatrixView matrix = view.matrix()
    sums, squares, tops = np.zeros(matrix.rows), np.zeros(matrix.rows), np.zeros(matrix.rows)
    cdef double[::1] c_sums = sums, c_squares = squares, c_tops = tops
    if matrix.rows and matrix.cols:
        with nogil:
            c_row_moments(<Isa>isa, matrix, &c_sums[0], &c_squares[0], &c_tops[0], workers)
    return RowMoments(sums, squares, tops)


def row_sum_of_squares(object x, *, object threads=1) -> np.ndarray:
    """Sum of squares of each row of ``x`` [rows, cols] as float64 [rows]; input, error and errors as `row_moments`.

    >>> import numpy as np
    >>> row_sum_of_squares(np.array([[3.0, -4.0], [0.0, 1.0]], dtype=np.float32))
    array([25.,  1.])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView view = matrix_of(x, "x", "rows, cols")
    cdef MatrixView matrix = view.matrix()
    squares = np.zeros(matrix.rows)
    cdef double[::1] c_squares = squares
    if matrix.rows and matrix.cols:
        with nogil:
            c_row_sum_of_squares(<Isa>isa, matrix, &c_squares[0], workers)
    return squares


def gradient_energy(object x, *, object threads=1) -> float:
    """Sum of the squares of all elements of ``x`` (the squared Frobenius norm), any number of axes.

    Input, relative error and errors as `row_moments`. Memory is read in the order in which it lies, so a transposed
    array gives bitwise the same result; another layout of the same values may round differently within the bound.

    >>> import numpy as np
    >>> gradient_energy(np.full((2, 3, 4), 0.5, dtype=np.float16))
    6.0
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView view = view_of(x, "x")
    cdef double[::1] blocks
    cdef Py_ssize_t count
    if view.size() == 0:
        return 0.0
    _put_in_memory_order(view)
    if view.rank == 2:
        return _matrix_energy(view, view.data, <Isa>isa, workers)
    # Three or more axes that no two strides can describe: one matrix per position of the outer axes.
    count = view.size() // (view.shape[view.rank - 2] * view.shape[view.rank - 1])
    blocks = np.empty(count)
    _fill_block_energies(view, <Isa>isa, workers, &blocks[0])
    return tree_sum(&blocks[0], count)


cdef double _matrix_energy(ArrayView view, char* data, Isa isa, int workers) except? -1.0:
    cdef MatrixView matrix
    matrix.data, matrix.dtype = data, view.dtype
    matrix.rows, matrix.cols = view.shape[view.rank - 2], view.shape[view.rank - 1]
    matrix.row_stride, matrix.col_stride = view.strides[view.rank - 2], view.strides[view.rank - 1]
    with nogil:
        return c_sum_of_squares(isa, matrix, workers)


cdef int _fill_block_energies(ArrayView view, Isa isa, int workers, double* blocks) except -1:
    cdef Py_ssize_t index, rest, offset
    cdef Py_ssize_t count = view.size() // (view.shape[view.rank - 2] * view.shape[view.rank - 1])
    cdef int axis
    for index in range(count):
        rest, offset = index, 0
        for axis in range(view.rank - 3, -1, -1):
            offset += (rest % view.shape[axis]) * view.strides[axis]
            rest //= view.shape[axis]
        blocks[index] = _matrix_energy(view, view.data + offset, isa, workers)
    return 0


cdef void _put_in_memory_order(ArrayView view):
    """Rewrite the axes of a non-empty view: none of length 1, strides positive and falling, neighbours joined, rank >= 2."""
    cdef int kept = 0, axis, at
    cdef Py_ssize_t length, stride
    for axis in range(view.rank):
        length, stride = view.shape[axis], view.strides[axis]
        if length == 1:
            continue
        if stride < 0:
            view.data += (length - 1) * stride
            stride = -stride
        at = kept
        while at > 0 and view.strides[at - 1] < stride:
            view.shape[at], view.strides[at] = view.shape[at - 1], view.strides[at - 1]
            at -= 1
        view.shape[at], view.strides[at] = length, stride
        kept += 1
    axis = 0
    for at in range(1, kept):
        if view.strides[axis] == view.strides[at] * view.shape[at]:
            view.shape[axis] *= view.shape[at]
            view.strides[axis] = view.strides[at]
        else:
            axis += 1
            view.shape[axis], view.strides[axis] = view.shape[at], view.strides[at]
    view.rank = axis + 1 if kept else 0
    while view.rank < 2:
        for at in range(view.rank, 0, -1):
            view.shape[at], view.strides[at] = view.shape[at - 1], view.strides[at - 1]
        view.shape[0], view.strides[0] = 1, 0
        view.rank += 1
