from libcpp.vector cimport vector


cdef extern from "layerlens/arrays.hpp" namespace "layerlens" nogil:
    cdef enum class DType(int):
        f32
        f64
        bf16
        f16

    Py_ssize_t item_size(DType dtype)

    cdef cppclass MatrixView:
        const void* data
        DType dtype
        Py_ssize_t rows
        Py_ssize_t cols
        Py_ssize_t row_stride
        Py_ssize_t col_stride


cdef enum:
    MAX_RANK = 64


# An array in CPU memory that someone else owns; `owner` keeps it alive. Strides are in bytes.
cdef class ArrayView:
    cdef object owner
    cdef char* data
    cdef DType dtype
    cdef bint read_only
    cdef int rank
    cdef Py_ssize_t shape[MAX_RANK]
    cdef Py_ssize_t strides[MAX_RANK]

    cdef Py_ssize_t size(self)
    cdef MatrixView matrix(self)

# The view of NumPy arrays, buffers and DLPack tensors of f32, f64, bf16 or f16. `name` is the argument's, for messages.
cdef ArrayView view_of(object x, str name)

# The same, with exactly two axes; `axes` names them in the message.
cdef ArrayView matrix_of(object x, str name, str axes)

# Appends the matrices that together are the view, read in the order of memory: one if strides allow it, else one per
# position of the outer axes; none if it is empty. Reorders the axes of the view.
cdef int append_pieces(ArrayView view, vector[MatrixView]& pieces) except -1
