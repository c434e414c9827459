"""The compiled kernels. `reference.py` specifies each kernel as a function in plain NumPy.

The kernels take NumPy arrays, buffers and CPU tensors of float32, float64, bfloat16 and float16 without copying them
(bfloat16 through DLPack), and an explicit number of threads. The result is the same bit for bit for any number of
threads. No kernel imports torch.

The result is also the same bit for bit on every instruction set, except for the ghost norms, forms and Gram matrices.
These add float32 products in as many lanes as a register has, so they differ by their rounding: by up to 2.4e-7 of the
value in our measurements, below the tolerance of 1e-6 against the specification. Only Fisher traces, signals and the
tangent kernel use them, and LayerLens measures these on request. Utilities from traces and signals are rounded to five
digits, so a figure in a manifest differs only if its value lies at the edge of a rounding.
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
