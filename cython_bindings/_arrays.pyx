"""Arrays from any library as pointer, element type, shape and byte strides, without a copy and without importing torch.

Three doors: NumPy arrays and other objects with the buffer protocol; objects with ``__dlpack__`` (CPU torch tensors,
JAX arrays), which is also how bfloat16 comes in, since neither NumPy nor the buffer protocol knows it; and NumPy arrays
of the ``ml_dtypes`` bfloat16. Whatever cannot be read in place is refused with what came and what would work.
"""

from cpython.buffer cimport PyBUF_RECORDS_RO, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

import numpy as np


# dlpack.h, version 0.x ABI ("dltensor" capsules), the part that a reader needs.
cdef struct DLTensor:
    void* data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t type_code
    uint8_t type_bits
    uint16_t type_lanes
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset

# dlpack.h, version 1 ABI: functions that a class offers as __dlpack_c_exchange_api__, without Python calls per tensor.
cdef struct DLPackExchangeAPI:
    uint32_t major
    uint32_t minor
    void* previous
    void* managed_tensor_allocator
    void* managed_tensor_from_py_object_no_sync
    void* managed_tensor_to_py_object_no_sync
    int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out) except -1
    void* current_work_stream

cdef enum:
    DL_CPU = 1
    DL_CUDA = 2
    DL_CUDA_HOST = 3
    DL_ROCM_HOST = 11
    DL_FLOAT = 2
    DL_BFLOAT = 4

cdef char NATIVE_ORDER = b"<" if np.little_endian else b">"
cdef object _ndarray = np.ndarray, _MaskedArray = np.ma.MaskedArray

SUPPORTED = "float32, float64, bfloat16 and float16"


cdef class ArrayView:
    cdef Py_ssize_t size(self):
        cdef Py_ssize_t count = 1
        cdef int axis
        for axis in range(self.rank):
            count *= self.shape[axis]
        return count

    cdef MatrixView matrix(self):
        cdef MatrixView view
        view.data = self.data
        view.dtype = self.dtype
        view.rows, view.cols = self.shape[0], self.shape[1]
        view.row_stride, view.col_stride = self.strides[0], self.strides[1]
        return view


cdef class _Buffer:
    """Holds a Py_buffer for as long as an ArrayView reads it."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, x):
        PyObject_GetBuffer(x, &self.view, PyBUF_RECORDS_RO)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef object _wrong_dtype(str name, object dtype):
    return TypeError(f"{name} has elements of {dtype}; the kernels read {SUPPORTED} in native byte order: convert it first")


cdef object _not_in_place(object x, str name, object error):
    return TypeError(f"{name} ({type(x).__name__}) cannot be read in place through DLPack: {error}")


cdef int _check_rank(str name, int rank) except -1:
    if rank > MAX_RANK:
        raise ValueError(f"{name} has {rank} axes, at most {MAX_RANK} are supported")
    return 0


cdef ArrayView _from_buffer(object x, str name, bint as_bfloat16):
    cdef _Buffer buffer = _Buffer(x)
    cdef ArrayView result = ArrayView.__new__(ArrayView)
    cdef const char* code = buffer.view.format
    cdef int axis
    if code == NULL:
        raise _wrong_dtype(name, "no format (unsigned bytes)")
    if code[0] == b"@" or code[0] == b"=" or code[0] == NATIVE_ORDER:
        code += 1
    if as_bfloat16:
        result.dtype = DType.bf16
    elif code[0] == b"f" and code[1] == 0:
        result.dtype = DType.f32
    elif code[0] == b"d" and code[1] == 0:
        result.dtype = DType.f64
    elif code[0] == b"e" and code[1] == 0:
        result.dtype = DType.f16
    else:
        raise _wrong_dtype(name, getattr(x, "dtype", f"buffer format {buffer.view.format.decode('ascii')!r}"))
    _check_rank(name, buffer.view.ndim)
    result.owner = buffer
    result.data = <char*>buffer.view.buf
    result.read_only = buffer.view.readonly
    result.rank = buffer.view.ndim
    for axis in range(result.rank):
        result.shape[axis] = buffer.view.shape[axis]
        result.strides[axis] = buffer.view.strides[axis]
    return result


cdef int _check_device(object x, str name, int device_type, int device_id) except -1:
    if device_type not in (DL_CPU, DL_CUDA_HOST, DL_ROCM_HOST):
        device = f"CUDA device {device_id}" if device_type == DL_CUDA else f"a device of DLPack type {device_type}"
        raise TypeError(f"{name} is on {device}; the kernels read CPU memory: pass {name}.cpu()")
    return 0


cdef ArrayView _from_dlpack(object x, str name):
    cdef DLTensor tensor
    cdef DLPackExchangeAPI* api
    is_negated = getattr(x, "is_neg", None)
    if is_negated is not None and is_negated():  # torch.imag of a conjugate: DLPack does not carry the sign
        x = x.resolve_neg()
    # Only of the class itself: a subclass (a fake tensor, say) may lack the memory that its parent has.
    capsule = type(x).__dict__.get("__dlpack_c_exchange_api__")
    if capsule is not None and PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        api = <DLPackExchangeAPI*>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        if api.major == 1 and api.dltensor_from_py_object_no_sync != NULL:
            try:
                api.dltensor_from_py_object_no_sync(<void*>x, &tensor)
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                raise _not_in_place(x, name, error) from error
            _check_device(x, name, tensor.device_type, tensor.device_id)
            return _view_of_tensor(&tensor, x, x, name)
    try:
        device_type, device_id = x.__dlpack_device__()
        _check_device(x, name, device_type, device_id)
        if getattr(x, "requires_grad", False):
            x = x.detach()
        capsule = x.__dlpack__()
    except (BufferError, RuntimeError, ValueError) as error:
        raise _not_in_place(x, name, error) from error
    # The capsule keeps its name and stays ours: its destructor gives the tensor back.
    return _view_of_tensor(<DLTensor*>PyCapsule_GetPointer(capsule, "dltensor"), capsule, x, name)


cdef ArrayView _view_of_tensor(const DLTensor* tensor, object owner, object x, str name):
    cdef ArrayView result = ArrayView.__new__(ArrayView)
    cdef Py_ssize_t step
    cdef int axis
    if tensor.type_code == DL_FLOAT and tensor.type_bits == 32 and tensor.type_lanes == 1:
        result.dtype = DType.f32
    elif tensor.type_code == DL_FLOAT and tensor.type_bits == 64 and tensor.type_lanes == 1:
        result.dtype = DType.f64
    elif tensor.type_code == DL_FLOAT and tensor.type_bits == 16 and tensor.type_lanes == 1:
        result.dtype = DType.f16
    elif tensor.type_code == DL_BFLOAT and tensor.type_bits == 16 and tensor.type_lanes == 1:
        result.dtype = DType.bf16
    else:
        raise _wrong_dtype(name, getattr(x, "dtype", f"DLPack type {tensor.type_code} of {tensor.type_bits} bits"))
    _check_rank(name, tensor.ndim)
    result.owner = owner
    result.data = <char*>tensor.data + tensor.byte_offset
    result.read_only = False
    result.rank = tensor.ndim
    step = item_size(result.dtype)
    for axis in range(result.rank - 1, -1, -1):
        result.shape[axis] = tensor.shape[axis]
        if tensor.strides == NULL:
            result.strides[axis] = step
            step *= tensor.shape[axis]
        else:
            result.strides[axis] = tensor.strides[axis] * item_size(result.dtype)
    if tensor.data == NULL and result.size() > 0:
        raise TypeError(f"{name} ({type(x).__name__}) has no memory behind it (a fake tensor, or its storage was freed)")
    return result


cdef ArrayView view_of(object x, str name):
    if isinstance(x, _ndarray):
        if isinstance(x, _MaskedArray):
            raise TypeError(f"{name} is a masked array, whose mask the kernels would ignore: fill it first")
        dtype = x.dtype
        kind = dtype.kind
        if kind == "V" and dtype.name == "bfloat16" and dtype.itemsize == 2:
            return _from_buffer(x.view(np.uint16), name, True)
        if kind != "f" or dtype.itemsize > 8:
            raise _wrong_dtype(name, dtype)
        return _from_buffer(x, name, False)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _from_dlpack(x, name)
    if PyObject_CheckBuffer(x):
        return _from_buffer(x, name, False)
    raise TypeError(
        f"{name} must be a NumPy array, a CPU tensor (DLPack) or a buffer of {SUPPORTED}, got {type(x).__name__}"
    )


cdef ArrayView matrix_of(object x, str name, str axes):
    cdef ArrayView view = view_of(x, name)
    if view.rank != 2:
        shape = tuple([view.shape[axis] for axis in range(view.rank)])
        hint = f"; for a single row pass {name}[None, :]" if view.rank == 1 else ""
        raise ValueError(f"{name} must have the two axes [{axes}], got {view.rank} (shape {shape}){hint}")
    return view


cdef int append_pieces(ArrayView view, vector[MatrixView]& pieces) except -1:
    cdef MatrixView piece
    cdef Py_ssize_t index, rest, offset, count
    cdef int axis
    if view.size() == 0:
        return 0
    _put_in_memory_order(view)
    piece.dtype = view.dtype
    piece.rows, piece.cols = view.shape[view.rank - 2], view.shape[view.rank - 1]
    piece.row_stride, piece.col_stride = view.strides[view.rank - 2], view.strides[view.rank - 1]
    count = view.size() // (piece.rows * piece.cols)
    for index in range(count):
        rest, offset = index, 0
        for axis in range(view.rank - 3, -1, -1):
            offset += (rest % view.shape[axis]) * view.strides[axis]
            rest //= view.shape[axis]
        piece.data = view.data + offset
        pieces.push_back(piece)
    return 0


cdef void _put_in_memory_order(ArrayView view):
    """Rewrite the axes of a non-empty view: strides positive and falling, neighbours joined, at least two of them."""
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
