from libc.stdint cimport uint64_t

cdef extern from "layerlens/rademacher.hpp" namespace "layerlens" nogil:
    void fill_rademacher(uint64_t seed, uint64_t probe, float* out, Py_ssize_t n)
    void fill_rademacher(uint64_t seed, uint64_t probe, double* out, Py_ssize_t n)
