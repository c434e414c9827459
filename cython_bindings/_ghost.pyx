"""Per-sample gradient norms and inner products of a Linear from its inputs and output gradients (cpp/ghost)."""

from layerlens.kernels._arrays cimport ArrayView, DType, view_of
from layerlens.kernels._dispatch cimport Isa, active_isa, usable_threads

import numpy as np
from ghost cimport c_ghost_gram, c_ghost_norms, cheaper_ghost_form, GhostForm, SequenceView


cdef tuple _shape(ArrayView view):
    return tuple([view.shape[axis] for axis in range(view.rank)])


cdef SequenceView _sequences(ArrayView view, str name) except *:
    """[batch, tokens, features], or [batch, features] as one token each."""
    cdef SequenceView sequences
    if view.rank not in (2, 3):
        raise ValueError(
            f"{name} must have the axes [batch, tokens, features] or [batch, features], got shape {_shape(view)}"
        )
    sequences.data, sequences.dtype = view.data, view.dtype
    sequences.batch, sequences.batch_stride = view.shape[0], view.strides[0]
    sequences.features, sequences.feature_stride = view.shape[view.rank - 1], view.strides[view.rank - 1]
    sequences.tokens, sequences.token_stride = 1, 0
    if view.rank == 3:
        sequences.tokens, sequences.token_stride = view.shape[1], view.strides[1]
    return sequences


cdef int _check_pair(ArrayView h, ArrayView d) except -1:
    if h.rank != d.rank or h.shape[0] != d.shape[0] or (h.rank == 3 and h.shape[1] != d.shape[1]):
        raise ValueError(
            "inputs and output_gradients must have the same batch and tokens, "
            f"got shapes {_shape(h)} and {_shape(d)}"
        )
    return 0


def ghost_norms(object inputs, object output_gradients, *, str form="auto", object threads=1) -> np.ndarray:
    """|g_n|^2 of each sample's weight gradient g_n = sum_t d_nt h_nt^T of a Linear, not formed; float64 [batch].

    ``inputs`` h [batch, tokens, d_in] and ``output_gradients`` d [batch, tokens, d_out] (or both without the tokens):
    float32, float64, bfloat16 or float16, any strides. d is the gradient of the per-sample loss; padded tokens must
    have d = 0. ``form``: "gram" (sum over token pairs of (d_t . d_s)(h_t . h_s)), "direct" (tiles of g_n), or "auto",
    the cheaper one. Threads share the samples; the result is bitwise the same for any number of them.

    Products are in float32 (float64 if either input is), sums of squares in float64. The error is at most about
    (max(d_in + d_out, 2 tokens) + 8) u | |D|^T |H| |_F^2 with u = 2^-24 (2^-53), typically below 1e-6 of the norm.

    Raises TypeError for other element types, objects and devices, ValueError for shapes that do not fit.
    Reference: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679.

    >>> import numpy as np
    >>> h, d = np.array([[[1.0, 2.0], [0.0, 1.0]]]), np.array([[[1.0], [3.0]]])
    >>> ghost_norms(h, d)  # g = 1 * [1, 2] + 3 * [0, 1] = [1, 5]
    array([26.])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView h_view = view_of(inputs, "inputs"), d_view = view_of(output_gradients, "output_gradients")
    cdef SequenceView h = _sequences(h_view, "inputs"), d = _sequences(d_view, "output_gradients")
    cdef GhostForm chosen
    _check_pair(h_view, d_view)
    if form == "auto":
        chosen = GhostForm.automatic
    elif form == "gram":
        chosen = GhostForm.gram
    elif form == "direct":
        chosen = GhostForm.direct
    else:
        raise ValueError(f"form must be 'auto', 'gram' or 'direct', got {form!r}")
    norms = np.zeros(h.batch)
    cdef double[::1] c_norms = norms
    if h.batch:
        with nogil:
            c_ghost_norms(<Isa>isa, h, d, chosen, &c_norms[0], workers)
    return norms


def ghost_gram(object inputs, object output_gradients, *, object threads=1) -> np.ndarray:
    """<g_n, g_m> of all pairs of samples' weight gradients of a Linear: the empirical NTK; float64 [batch, batch].

    Arguments, error and errors as `ghost_norms`; the cost grows as batch^2 tokens^2 (d_in + d_out) / 2.

    >>> import numpy as np
    >>> ghost_gram(np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[1.0], [3.0]]))
    array([[5., 6.],
           [6., 9.]])
    """
    cdef int isa = active_isa(), workers = usable_threads(threads)
    cdef ArrayView h_view = view_of(inputs, "inputs"), d_view = view_of(output_gradients, "output_gradients")
    cdef SequenceView h = _sequences(h_view, "inputs"), d = _sequences(d_view, "output_gradients")
    _check_pair(h_view, d_view)
    products = np.zeros((h.batch, h.batch))
    cdef double[:, ::1] c_products = products
    if h.batch:
        with nogil:
            c_ghost_gram(<Isa>isa, h, d, &c_products[0, 0], workers)
    return products


def ghost_form(Py_ssize_t tokens, Py_ssize_t d_in, Py_ssize_t d_out) -> str:
    """The form that `ghost_norms` takes for these sizes: "gram" or "direct".

    >>> ghost_form(64, 768, 768), ghost_form(2048, 768, 768)
    ('gram', 'direct')
    """
    return "gram" if cheaper_ghost_form(tokens, d_in, d_out) == GhostForm.gram else "direct"
