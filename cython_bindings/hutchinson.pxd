from libc.stdint cimport uint64_t

from layerlens.kernels._arrays cimport DType

cdef extern from "layerlens/hutchinson.hpp" namespace "layerlens" nogil:
    void fill_rademacher(uint64_t seed, uint64_t probe, float* out, Py_ssize_t n)
    void fill_rademacher(uint64_t seed, uint64_t probe, double* out, Py_ssize_t n)
    double rademacher_dot(uint64_t seed, uint64_t probe, const void* y, DType dtype, Py_ssize_t n, Py_ssize_t stride)
