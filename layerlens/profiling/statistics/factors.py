"""Kronecker factors of a layer, A = E[z zᵀ] over tokens and S = E[Σ_t d dᵀ] over samples (K-FAC).

Martens & Grosse 2015, arXiv:1503.05671. Looked-up weights have none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.linalg.blas import dsyrk, ssyrk

from layerlens.profiling.sample_matrices import uses_kernels
from layerlens.profiling.statistics import InputBatch, MatrixAccumulator, MatrixBatch, Place, Statistic, Sum


def add_gram(total__gkk: torch.Tensor, rows__gnk: torch.Tensor) -> None:
    """Add Σ z zᵀ over the rows of each g in place, with half the multiplications of a product: only one triangle.

    On the CPU one rank-k update (BLAS syrk) adds a batch in place, 2.1 times as fast as the matrix product for 3072
    features (docs/decisions.md). Half precision is summed in float32.
    """
    rows = rows__gnk.to(total__gkk.dtype)
    if len(rows) > 1 or not uses_kernels(rows):
        total__gkk.baddbmm_(rows.mT, rows)
        return
    # Fortran order is the transpose's order: the lower triangle of the C-ordered total is updated in place.
    update = dsyrk if rows.dtype == torch.float64 else ssyrk
    update(1.0, rows[0].contiguous().numpy().T, beta=1.0, c=total__gkk[0].numpy().T, overwrite_c=1)


def whole_gram(total__gkk: torch.Tensor) -> torch.Tensor:
    """float64 [g, k, k], symmetric, from what ``add_gram`` summed, on its device."""
    lower = total__gkk.double().tril()
    return lower + lower.tril(-1).mT


def _add_inputs(total__gii: torch.Tensor, batch: InputBatch) -> None:
    add_gram(total__gii, batch.z__bgti.transpose(0, 1).flatten(1, 2))


def _add_gradients(total__goo: torch.Tensor, batch: MatrixBatch) -> None:
    assert batch.matrices.d__bgto is not None
    add_gram(total__goo, batch.matrices.d__bgto.transpose(0, 1).flatten(1, 2))


INPUT_FACTOR = Sum("factor", _add_inputs, lambda place: (place.shape[0], place.shape[2], place.shape[2]))
OUTPUT_FACTOR = Sum(
    "output factor", _add_gradients, lambda place: (place.shape[0], place.shape[1], place.shape[1]),
    has=lambda batch: batch.matrices.d__bgto is not None,
)  # fmt: skip


def exact_factors(matrix: MatrixAccumulator) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(A, S), float64; None for what is only looked up."""
    if OUTPUT_FACTOR.name not in matrix.totals:
        return None
    inputs = matrix.inputs.mean(whole_gram(matrix.inputs.totals[INPUT_FACTOR.name]))
    return inputs, whole_gram(matrix.totals[OUTPUT_FACTOR.name]) / sum(matrix.n_samples)


def _single(factor: torch.Tensor) -> np.ndarray:
    return factor.float().cpu().numpy()


def _factors(matrix: MatrixAccumulator) -> dict[str, Any]:
    if OUTPUT_FACTOR.name not in matrix.totals:
        return {}
    inputs, outputs = matrix.inputs, matrix.totals[OUTPUT_FACTOR.name]
    # One array for all layers that share it: the statistics file keeps it once.
    a = inputs.once("A", lambda: _single(inputs.mean(whole_gram(inputs.totals[INPUT_FACTOR.name]))))
    return {"input_factor": a, "output_factor": _single(whole_gram(outputs) / sum(matrix.n_samples))}


def factor_floats(place: Place) -> int:
    """float64 numbers that reading the factors takes."""
    return 3 * (place.shape[1] ** 2 + place.shape[2] ** 2)


FACTORS = Statistic(
    "factors", lambda place: (OUTPUT_FACTOR,), (INPUT_FACTOR,), _factors, fields=("output_factor", "input_factor"),
    working_floats=factor_floats,
)  # fmt: skip
