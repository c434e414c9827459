"""The compiled kernels, and beside each its plain NumPy twin (`reference.py`), which is its specification.

All take NumPy arrays, buffers and CPU tensors of float32, float64, bfloat16 and float16 without copying them (bfloat16
through DLPack), and an explicit thread count, and give the same bits for every thread count. Nothing imports torch.

For every instruction set, too, all give the same bits but the ghost norms, forms and Gram matrices. Those add float32
products in as many lanes as a register has, so that from one set to another they differ by their rounding: up to 2.4e-7
of the value was seen, below the 1e-6 that each of them is held to against its twin. Only Fisher traces, signals and the
tangent kernel, which are measured on request, come from them. Utilities from traces and signals are rounded to five
digits, so that a manifest's figures differ only where a value lies next to the edge of a rounding; all others are the
same bits anyway.
"""

from layerlens.kernels._aggregate import aggregate_scores
from layerlens.kernels._dispatch import available_isas, isa
from layerlens.kernels._fisher import fisher_diagonal, fisher_trace
from layerlens.kernels._ghost import ghost_form, ghost_gram, ghost_norms
from layerlens.kernels._moments import (
    RowMoments,
    Statistics,
    gradient_energy,
    matrix_traces,
    ragged_statistics,
    ragged_sum_of_squares,
    row_moments,
    row_statistics,
    row_sum_of_squares,
)
from layerlens.kernels._rademacher import rademacher

__all__ = [
    "RowMoments",
    "Statistics",
    "aggregate_scores",
    "available_isas",
    "fisher_diagonal",
    "fisher_trace",
    "ghost_form",
    "ghost_gram",
    "ghost_norms",
    "gradient_energy",
    "isa",
    "matrix_traces",
    "rademacher",
    "ragged_statistics",
    "ragged_sum_of_squares",
    "row_moments",
    "row_statistics",
    "row_sum_of_squares",
]
