cdef extern from "layerlens/dispatch.hpp" namespace "layerlens" nogil:
    cdef enum class Isa(int):
        scalar
        avx2
        avx512

    const int isa_count
    const char* isa_name(Isa isa)
    bint isa_available(Isa isa)
    Isa best_isa()
    void watch_forks()
    bint in_forked_child()


# The Isa (as int) that kernels must use now; raises ConfigurationError when LAYERLENS_ISA cannot be followed.
cdef int active_isa() except -1

# A checked thread count: at least 1, and 1 in a forked child, where a parallel region would hang.
cdef int usable_threads(object threads) except -1
