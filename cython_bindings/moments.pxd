from libc.stdint cimport int64_t

from layerlens.kernels._arrays cimport MatrixView
from layerlens.kernels._dispatch cimport Isa

cdef extern from "layerlens/moments.hpp" namespace "layerlens" nogil:
    cdef cppclass StatisticsOut:
        double* sum
        double* sum_of_squares
        double* max_abs
        int64_t* non_finite
        int64_t* zeros

    void c_row_statistics "layerlens::row_statistics"(
        Isa isa, const MatrixView& x, const StatisticsOut& out, int threads) except +
    void c_row_sum_of_squares "layerlens::row_sum_of_squares"(
        Isa isa, const MatrixView& x, double* out, int threads) except +
    void array_statistics(
        Isa isa, const MatrixView* pieces, const Py_ssize_t* starts, Py_ssize_t arrays, const StatisticsOut& out,
        int threads) except +
    void array_sum_of_squares(
        Isa isa, const MatrixView* pieces, const Py_ssize_t* starts, Py_ssize_t arrays, double* out,
        int threads) except +
