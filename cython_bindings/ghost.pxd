from layerlens.kernels._arrays cimport DType
from layerlens.kernels._dispatch cimport Isa

cdef extern from "layerlens/ghost.hpp" namespace "layerlens" nogil:
    cdef cppclass SequenceView:
        const void* data
        DType dtype
        Py_ssize_t batch
        Py_ssize_t tokens
        Py_ssize_t features
        Py_ssize_t batch_stride
        Py_ssize_t token_stride
        Py_ssize_t feature_stride

    cdef enum class GhostForm(int):
        automatic
        gram
        direct

    GhostForm cheaper_ghost_form(Py_ssize_t tokens, Py_ssize_t d_in, Py_ssize_t d_out)
    void c_ghost_norms "layerlens::ghost_norms"(
        Isa isa, const SequenceView& h, const SequenceView& d, GhostForm form, double* out, int threads) except +
    void c_ghost_gram "layerlens::ghost_gram"(
        Isa isa, const SequenceView& h, const SequenceView& d, double* out, int threads) except +
