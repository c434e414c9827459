"""Kronecker factors of a layer, A = E[z zᵀ] over tokens and S = E[Σ_t d dᵀ] over samples (K-FAC).

Martens & Grosse 2015, arXiv:1503.05671. Where inputs are indices, A is diagonal: how often each was looked up. The
statistic ``factors`` has no entry for what is looked up; the whitened spectrum reads its factors here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.profiling.sample_matrices import uses_kernels
from layerlens.profiling.statistics import InputBatch, MatrixAccumulator, MatrixBatch, Place, Statistic, Sum
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")


def add_gram(total__gkk: torch.Tensor, rows__gnk: torch.Tensor) -> None:
    """Add Σ z zᵀ over the rows of each g in place, with half the multiplications of a product: only one triangle.

    On the CPU one rank-k update (BLAS syrk) adds a batch in place, 2.1 times as fast as the matrix product for 3072
    features (docs/decisions/statistics.md). Half precision is summed in float32.
    """
    rows = rows__gnk.to(total__gkk.dtype)
    if len(rows) > 1 or not uses_kernels(rows):
        total__gkk.baddbmm_(rows.mT, rows)
        return
    # Fortran order is the transpose's order: the lower triangle of the C-ordered total is updated in place.
    from scipy.linalg.blas import dsyrk, ssyrk

    update = dsyrk if rows.dtype == torch.float64 else ssyrk
    update(1.0, rows[0].contiguous().numpy().T, beta=1.0, c=total__gkk[0].numpy().T, overwrite_c=1)


def whole_gram(total__gkk: torch.Tensor) -> torch.Tensor:
    """float64 [g, k, k], symmetric, from what ``add_gram`` summed, on its device."""
    lower = total__gkk.double().tril()
    return lower + lower.tril(-1).mT


def _add_inputs(total: torch.Tensor, batch: InputBatch) -> None:
    if batch.ids__n is None:
        add_gram(total, batch.z__bgti.transpose(0, 1).flatten(1, 2))
    else:
        total += torch.bincount(batch.ids__n, minlength=len(total)).to(total)


def _input_shape(place: Place) -> tuple[int, ...]:
    """[g, i, i]; only the diagonal where inputs are indices."""
    return (place.shape[1],) if place.looked_up else (place.shape[0], place.shape[2], place.shape[2])


def _add_row_gradients(total__goo: torch.Tensor, batch: MatrixBatch) -> None:
    assert batch.matrices.rows__bti is not None
    add_gram(total__goo, batch.matrices.rows__bti.flatten(0, 1)[None])


def _add_gradients(total__goo: torch.Tensor, batch: MatrixBatch) -> None:
    assert batch.matrices.d__bgto is not None
    add_gram(total__goo, batch.matrices.d__bgto.transpose(0, 1).flatten(1, 2))


INPUT_FACTOR = Sum("factor", _add_inputs, _input_shape, of_indices=True)
OUTPUT_FACTOR = Sum(
    "output factor", _add_gradients, lambda place: (place.shape[0], place.shape[1], place.shape[1]),
    has=lambda batch: batch.matrices.d__bgto is not None,
)  # fmt: skip
_ROW_FACTOR = Sum(
    OUTPUT_FACTOR.name, _add_row_gradients, lambda place: (place.shape[0], place.shape[2], place.shape[2]),
    has=lambda batch: batch.matrices.rows__bti is not None,
)  # fmt: skip


def output_factor(place: Place) -> Sum:
    """The sum that S is made from."""
    return _ROW_FACTOR if place.looked_up else OUTPUT_FACTOR


def exact_factors(matrix: MatrixAccumulator) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(A, S), float64 [g, k, k]; of A the diagonal [g, k] where inputs are indices. None without gradients."""
    if OUTPUT_FACTOR.name not in matrix.totals:
        return None
    if matrix.place.looked_up:
        diagonal = matrix.inputs.totals[INPUT_FACTOR.name].double()[None] / matrix.inputs.n_tokens
        return diagonal, whole_gram(matrix.totals[OUTPUT_FACTOR.name]) / sum(matrix.n_samples)
    inputs = matrix.inputs.mean(whole_gram(matrix.inputs.totals[INPUT_FACTOR.name]))
    return inputs, whole_gram(matrix.totals[OUTPUT_FACTOR.name]) / sum(matrix.n_samples)


def _single(factor: torch.Tensor) -> np.ndarray:
    return factor.float().cpu().numpy()


def _factors(matrix: MatrixAccumulator) -> dict[str, Any]:
    if OUTPUT_FACTOR.name not in matrix.totals or matrix.place.looked_up:
        return {}
    inputs, outputs = matrix.inputs, matrix.totals[OUTPUT_FACTOR.name]
    # One array for all layers that share it: the statistics file keeps it once.
    a = inputs.once("A", lambda: _single(inputs.mean(whole_gram(inputs.totals[INPUT_FACTOR.name]))))
    return {"input_factor": a, "output_factor": _single(whole_gram(outputs) / sum(matrix.n_samples))}


def factor_floats(place: Place) -> int:
    """float64 numbers that reading the factors takes."""
    if place.looked_up:
        return 3 * (place.shape[1] + place.shape[2] ** 2)
    return 3 * (place.shape[1] ** 2 + place.shape[2] ** 2)


FACTORS = Statistic(
    "factors", lambda place: () if place.looked_up else (OUTPUT_FACTOR,), (INPUT_FACTOR,), _factors,
    fields=("output_factor", "input_factor"),
    working_floats=factor_floats,
)  # fmt: skip
