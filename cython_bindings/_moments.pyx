"""Sums, sums of squares and other one-read statistics of rows and of whole arrays (cpp/moments)."""

from typing import NamedTuple

from libc.stdint cimport int64_t
from libcpp.vector cimport vector

import numpy as np

from layerlens.kernels._arrays cimport ArrayView, MatrixView, append_pieces, matrix_of, view_of
from layerlens.kernels._dispatch cimport Isa, active_isa, usable_threads
from moments cimport array_statistics, array_sum_of_squares, c_row_statistics, c_row_sum_of_squares, StatisticsOut


class RowMoments(NamedTuple):
    """What `row_moments` returns: three float64 arrays [rows]."""

    sum: np.ndarray
    sum_of_squares: np.ndarray
    max_abs: np.ndarray


class Statistics(NamedTuple):
    """What `row_statistics` and `ragged_statistics` return: one value per row or array.

    ``sum``, ``sum_of_squares``, ``max_abs``: float64. ``non_finite`` (NaN and infinities) and ``zeros``: int64 counts.
    """

    sum: np.ndarray
    sum_of_squares: np.ndarray
    max_abs: np.ndarray
    non_finite: np.ndarray
    zeros: np.ndarray


cdef object _empty_statistics(Py_ssize_t count, StatisticsOut* out):
    """Zeroed results and, in ``out``, where they lie."""
    result = Statistics(
        np.zeros(count), np.zeros(count), np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.int64)
    )
    cdef double[::1] sums = result.sum, squares = result.sum_of_squares, tops = result.max_abs
    cdef int64_t[::1] non_finite = result.non_finite, zeros = result.zeros
    if count:
        out.sum, out.sum_of_squares, out.max_abs = &sums[0], &squares[0], &tops[0]
        out.non_finite, out.zeros = &non_finite[0], &zeros[0]
    return result


def row_statistics(object x, *, object threads=1) -> Statistics:
    """Sum, sum of squares, max |x|, non-finite and zero counts of each row of ``x`` [rows, cols], in one read.

    ``x``: float32, float64, bfloat16 or float16; NumPy array, buffer or CPU tensor, any strides, never copied.
    ``threads``: how many threads may work; the result is bitwise the same for any number.

    The relative error of a sum of squares, and of a sum relative to the sum of |x|, is below 6e-7 for 32- and 16-bit
    input of any length, and below 1.2e-13 for float64. ``max_abs`` is exact: NaN if the row holds one, 0 if it is
    empty. Counts are exact.

    Raises TypeError for other element types, objects and devices, ValueError if ``x`` has not two axes.

    >>> import numpy as np
    >>> row_statistics(np.array([[3.0, -4.0, 0.0], [0.0, np.inf, 1.0]])).non_finite
    array([0, 1])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView view = matrix_of(x, "x", "rows, cols")
    cdef MatrixView matrix = view.matrix()
    cdef StatisticsOut out
    result = _empty_statistics(matrix.rows, &out)
    if matrix.rows and matrix.cols:
        with nogil:
            c_row_statistics(<Isa>isa, matrix, out, workers)
    return result


def row_moments(object x, *, object threads=1) -> RowMoments:
    """Sum, sum of squares and max |x| of each row of ``x`` [rows, cols]: the first three of `row_statistics`.

    >>> import numpy as np
    >>> row_moments(np.array([[3.0, -4.0], [0.0, 1.0]])).max_abs
    array([4., 1.])
    """
    return RowMoments(*row_statistics(x, threads=threads)[:3])


def row_sum_of_squares(object x, *, object threads=1) -> np.ndarray:
    """Sum of squares of each row of ``x`` [rows, cols] as float64 [rows]; input, error and errors as `row_statistics`.

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

    Input, relative error and errors as `row_statistics`. Memory is read in the order in which it lies, so a transposed
    array gives bitwise the same result; another layout of the same values may round differently within the bound.

    >>> import numpy as np
    >>> gradient_energy(np.full((2, 3, 4), 0.5, dtype=np.float16))
    6.0
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView view = view_of(x, "x")
    cdef vector[MatrixView] pieces
    cdef Py_ssize_t starts[2]
    cdef double energy = 0.0
    append_pieces(view, pieces)
    starts[0], starts[1] = 0, <Py_ssize_t>pieces.size()
    with nogil:
        array_sum_of_squares(<Isa>isa, pieces.data(), starts, 1, &energy, workers)
    return energy


cdef list _gather_pieces(object arrays, vector[MatrixView]& pieces, vector[Py_ssize_t]& starts):
    """Fill the ragged arguments; the returned views must live until the kernel has run."""
    cdef ArrayView view
    cdef list views = []
    starts.push_back(0)
    for index, x in enumerate(arrays):
        view = view_of(x, f"arrays[{index}]")
        append_pieces(view, pieces)
        starts.push_back(<Py_ssize_t>pieces.size())
        views.append(view)
    return views


def ragged_statistics(object arrays, *, object threads=1) -> Statistics:
    """The five statistics of each of ``arrays`` (an iterable; any shapes, types may differ), in one call.

    Returns one value per array. Input, error and errors as `row_statistics`; the sum of squares is bitwise what
    `gradient_energy` gives for that array. One call on many small tensors costs one start of the threads, not many.

    >>> import numpy as np
    >>> ragged_statistics([np.ones((2, 3)), np.zeros(5, dtype=np.float32)]).zeros
    array([0, 5])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef vector[MatrixView] pieces
    cdef vector[Py_ssize_t] starts
    cdef StatisticsOut out
    views = _gather_pieces(arrays, pieces, starts)
    cdef Py_ssize_t count = len(views)
    result = _empty_statistics(count, &out)
    if count:
        with nogil:
            array_statistics(<Isa>isa, pieces.data(), starts.data(), count, out, workers)
    return result


def ragged_sum_of_squares(object arrays, *, object threads=1) -> np.ndarray:
    """Sum of squares of each of ``arrays`` as float64 [len(arrays)]: `gradient_energy` of many arrays in one call.

    >>> import numpy as np
    >>> ragged_sum_of_squares([np.ones((2, 3)), np.full(4, 2.0, dtype=np.float32), np.empty(0)])
    array([ 6., 16.,  0.])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef vector[MatrixView] pieces
    cdef vector[Py_ssize_t] starts
    views = _gather_pieces(arrays, pieces, starts)
    cdef Py_ssize_t count = len(views)
    squares = np.zeros(count)
    cdef double[::1] c_squares = squares
    if count:
        with nogil:
            array_sum_of_squares(<Isa>isa, pieces.data(), starts.data(), count, &c_squares[0], workers)
    return squares


def matrix_traces(object matrices, *, object threads=1) -> np.ndarray:
    """The traces of square ``matrices`` (an iterable; sizes and types may differ), such as per-layer Fisher blocks.

    Float64 [len(matrices)]; only the diagonals are read. Input, error and errors as `row_statistics`, and ValueError
    for a matrix that is not square.

    >>> import numpy as np
    >>> matrix_traces([np.eye(3), np.full((2, 2), 0.5, dtype=np.float32)])
    array([3., 1.])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView view
    cdef MatrixView diagonal
    cdef vector[MatrixView] pieces
    cdef vector[Py_ssize_t] starts
    cdef StatisticsOut out
    cdef list views = []
    for index, matrix in enumerate(matrices):
        view = matrix_of(matrix, f"matrices[{index}]", "n, n")
        diagonal = view.matrix()
        if diagonal.rows != diagonal.cols:
            raise ValueError(f"matrices[{index}] must be square, got shape ({diagonal.rows}, {diagonal.cols})")
        diagonal.rows = 1
        diagonal.col_stride += diagonal.row_stride
        starts.push_back(<Py_ssize_t>pieces.size())
        pieces.push_back(diagonal)
        views.append(view)
    starts.push_back(<Py_ssize_t>pieces.size())
    cdef Py_ssize_t count = len(views)
    result = _empty_statistics(count, &out)
    if count:
        with nogil:
            array_statistics(<Isa>isa, pieces.data(), starts.data(), count, out, workers)
    return result.sum
