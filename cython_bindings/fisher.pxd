from layerlens.kernels._arrays cimport DType, MatrixView
from layerlens.kernels._dispatch cimport Isa

cdef extern from "layerlens/fisher.hpp" namespace "layerlens" nogil:
    double c_fisher_trace "layerlens::fisher_trace"(Isa isa, const MatrixView& g, int threads) except +
    void add_column_sum_of_squares(
        Isa isa, const MatrixView& g, double scale, DType out_type, void* out, int threads
    ) except +
