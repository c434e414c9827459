cdef extern from "layerlens/aggregate.hpp" namespace "layerlens" nogil:
    Py_ssize_t c_aggregate_scores "layerlens::aggregate_scores"(
        const double* metrics, const double* weights, Py_ssize_t count, Py_ssize_t layers, double* out)
