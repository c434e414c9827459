"""Spectra and factors by random projections: for a fraction of the cost, each with its error.

With P = d Ψ and Q = z Ω (``projections``):

- the spectrum of G = Σ dᵀz follows from G Ω = Σ dᵀQ and Ψᵀ G = Σ Pᵀz (generalised Nyström; Tropp et al. 2017,
  arXiv:1609.00048). A sketch from one side alone loses the tail; how much this one loses is estimated from columns of
  Ω that the approximation does not see (Halko et al. 2011, section 4.3);
- a Kronecker factor A = Σ zᵀz from A Ω = Σ zᵀQ (Nyström; Tropp et al. 2017, arXiv:1706.05736), which loses exactly the
  trace that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.models import FactorSketch
from layerlens.profiling.accumulators import MatrixAccumulator
from layerlens.profiling.projections import COLUMNS, PROBES, ROWS, Projection
from layerlens.profiling.sample_matrices import sum_of_squares
from layerlens.profiling.statistics import Statistic
from layerlens.profiling.statistics.gradients import HALVES
from layerlens.profiling.statistics.spectra import MAX_VALUES, eight_copies, plain_spectrum
from layerlens.profiling.sums import InputBatch, MatrixBatch, Place, Sum
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")


def add_rows(total: torch.Tensor, rows__nk: torch.Tensor, others__nl: torch.Tensor) -> None:
    """Add rowsᵀ others in place, in the precision of the total."""
    total.addmm_(rows__nk.to(total.dtype).mT, others__nl.to(total.dtype))


def _add_right(total__hok: torch.Tensor, batch: MatrixBatch) -> None:
    _add_halves(total__hok, batch, batch.d__bto, batch.projected_z__btk)


def _add_left(total__hli: torch.Tensor, batch: MatrixBatch) -> None:
    _add_halves(total__hli, batch, batch.projected_d__btl, batch.z__bti)


def _add_halves(total: torch.Tensor, batch: MatrixBatch, rows__btk: torch.Tensor, others__btl: torch.Tensor) -> None:
    for half in (0, 1):
        chosen__b = batch.of_half(half)
        if chosen__b is not None:
            add_rows(total[half], rows__btk[chosen__b].flatten(0, 1), others__btl[chosen__b].flatten(0, 1))


def _projects(batch: InputBatch | MatrixBatch) -> bool:
    return batch.projects


def _add_input_sketch(total__ik: torch.Tensor, batch: InputBatch) -> None:
    assert batch.projection is not None
    add_rows(total__ik, batch.rows__ni, batch.projection.of_inputs(batch.rows__ni)[:, : total__ik.shape[1]])


def _add_output_sketch(total__ok: torch.Tensor, batch: MatrixBatch) -> None:
    add_rows(total__ok, batch.d__bto.flatten(0, 1), batch.projected_d__btl.flatten(0, 1)[:, : total__ok.shape[1]])


RIGHT = Sum(
    "right sketch", _add_right, lambda place: (2, place.shape[1], COLUMNS + PROBES), has=_projects, projects=True
)
"""G Ω of both halves of the samples."""
LEFT = Sum("left sketch", _add_left, lambda place: (2, ROWS, place.shape[2]), has=_projects, projects=True)
"""Ψᵀ G of both."""
INPUT_SKETCH = Sum(
    "input sketch", _add_input_sketch, lambda place: (place.shape[2], COLUMNS), has=_projects, projects=True
)
INPUT_TRACE = Sum("input trace", lambda batch: batch.squares, reduction="batches", has=_projects)
OUTPUT_SKETCH = Sum(
    "output sketch", _add_output_sketch, lambda place: (place.shape[1], COLUMNS), has=_projects, projects=True
)
OUTPUT_TRACE = Sum(
    "output trace", lambda batch: sum_of_squares(batch.d__bto.flatten(0, 1), batch.threads), reduction="batches",
    has=_projects,
)  # fmt: skip


def spectrum_from(
    right__hok: torch.Tensor, left__hli: torch.Tensor, n_samples: Sequence[int], projection: Projection
) -> tuple[np.ndarray, float]:
    """The split-half spectrum (see ``split_half_spectrum``), and the relative error ‖G − Ĝ‖_F / ‖G‖_F of a half.

    No singular value of a half is off by more than its ‖G − Ĝ‖_F (Weyl).
    """
    like = right__hok.new_empty(0, dtype=torch.float64)
    omega__ik = projection.omega__ik(left__hli.shape[2], like)
    psi__ol = projection.psi__ol(right__hok.shape[1], like)
    parts, errors = [], []
    for half, count in enumerate(n_samples):
        right, left = right__hok[half].double() / count, left__hli[half].double() / count
        basis__oc, _ = torch.linalg.qr(right[:, :COLUMNS])
        rotation__lc, triangle__cc = torch.linalg.qr(psi__ol.mT @ basis__oc)  # of full rank: twice as many rows
        core__ci = torch.linalg.solve_triangular(triangle__cc, rotation__lc.mT @ left, upper=True)
        parts.append((basis__oc, core__ci))
        probes__op = right[:, COLUMNS:]
        missed = probes__op - basis__oc @ (core__ci @ omega__ik[:, COLUMNS:])
        norm = float(probes__op.square().sum())
        errors.append(float(missed.square().sum()) / norm if norm > 0.0 else 0.0)
    estimates = []
    for (basis, core), (other_basis, other_core) in (parts, parts[::-1]):
        left_c, values, right_t = torch.linalg.svd(core, full_matrices=False)
        to_half = (basis @ left_c).mT @ other_basis @ (other_core @ right_t.mT)
        estimates.append(values * to_half.diagonal())
    both = (estimates[0] + estimates[1]) / 2
    spectrum = both.sort(descending=True).values[:MAX_VALUES].cpu().numpy().copy()
    return spectrum, float(np.sqrt(np.mean(errors)))


def factor_from(total__ik: torch.Tensor, squares: float, signs__ik: torch.Tensor, count: float) -> FactorSketch:
    """The Nyström approximation of A / count, of trace ``squares`` / count, by its eigenvalues and vectors."""
    total, omega = total__ik.double() / count, signs__ik[:, : total__ik.shape[1]].double()
    # Shifted by some rounding errors of the sum, so that rounding leaves no eigenvalue below 0.
    shift = 10.0 * torch.finfo(total__ik.dtype).eps * float(torch.linalg.matrix_norm(total, 2))
    shifted = total + shift * omega
    core = omega.mT @ shifted
    core_values, core_vectors = torch.linalg.eigh((core + core.mT) / 2)
    usable = core_values > 1e-3 * shift  # fewer than the columns where the factor has fewer features
    half = shifted @ (core_vectors[:, usable] * core_values[usable].rsqrt())
    vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
    values = (singular.square() - shift).clamp_min(0.0)
    trace = squares / count
    error = max(0.0, 1.0 - float(values.sum()) / trace) if trace > 0.0 else 0.0
    return FactorSketch(values.cpu().numpy().copy(), vectors.float().cpu().numpy().copy(), trace, error)


def _sums_of_spectrum(place: Place) -> tuple[Sum, ...]:
    return (RIGHT, LEFT) if place.sketched else HALVES


def _sketched_spectrum(matrix: MatrixAccumulator) -> dict[str, Any]:
    if not matrix.place.sketched:
        plain = plain_spectrum(matrix)
        return {} if plain is None else {"sketched_spectrum": plain, "sketch_error": 0.0}
    if 0 in matrix.n_samples or RIGHT.name not in matrix.totals:
        return {}
    assert matrix.projection is not None
    right, left = matrix.totals[RIGHT.name], matrix.totals[LEFT.name]
    spectrum, error = spectrum_from(right, left, matrix.n_samples, matrix.projection)
    return {"sketched_spectrum": spectrum, "sketch_error": error}


def _sketched_factors(matrix: MatrixAccumulator) -> dict[str, Any]:
    if matrix.projection is None or OUTPUT_SKETCH.name not in matrix.totals:
        return {}
    outputs, inputs, (_, n_out, n_in) = matrix.totals[OUTPUT_SKETCH.name], matrix.inputs, matrix.place.shape
    assert inputs.projection is not None
    psi, omega = matrix.projection.psi__ol(n_out, outputs), inputs.projection.omega__ik(n_in, outputs)
    of_inputs = inputs.totals[INPUT_SKETCH.name], inputs.numbers[INPUT_TRACE.name]
    return {
        "output_sketch": factor_from(outputs, matrix.numbers[OUTPUT_TRACE.name], psi, sum(matrix.n_samples)),
        "input_sketch": factor_from(*of_inputs, omega, inputs.n_tokens),
    }


SKETCHED_SPECTRUM = Statistic(
    "sketched_spectrum", _sums_of_spectrum, result=_sketched_spectrum, fields=("sketched_spectrum", "sketch_error"),
    working_floats=eight_copies,
)  # fmt: skip
"""The spectrum of the mean gradient by projections, or itself for matrices that are not worth sketching."""

SKETCHED_FACTORS = Statistic(
    "sketched_factors", lambda place: (OUTPUT_SKETCH, OUTPUT_TRACE), (INPUT_SKETCH, INPUT_TRACE), _sketched_factors,
    fields=("output_sketch", "input_sketch"),
)  # fmt: skip
"""The Kronecker factors by projections; of matrices with one head."""
