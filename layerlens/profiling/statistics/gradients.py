"""First and second moments of per-sample gradients, and of inputs: Fisher trace, gradient energy, signal, input scale.

With the gradient M_n of sample n: trace = mean_n ‖M_n‖², energy = ‖M‖² of the mean M, signal = energy − (trace −
energy)/(N − 1), the unbiased estimate of the squared norm of the true mean gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerlens.profiling.statistics import InputBatch, MatrixAccumulator, MatrixBatch, Place, Statistic, Sum
from layerlens.profiling.sums import shape_of_matrix
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")


def _add_all(total__goi: torch.Tensor, batch: MatrixBatch) -> None:
    batch.matrices.add_sum_to(total__goi)


def _add_half(half: int) -> Any:
    def add(total__goi: torch.Tensor, batch: MatrixBatch) -> None:
        chosen__b = batch.of_half(half)
        if chosen__b is not None:
            batch.matrices.add_sum_to(total__goi, chosen__b)

    return add


SQUARED_NORMS = Sum(
    "squared norms", lambda batch: float(batch.matrices.squared_norms(batch.threads).sum()), reduction="batches"
)
MEAN = Sum("mean", _add_all, shape_of_matrix, spread=True)
HALVES = tuple(
    Sum(f"mean {half}", _add_half(half), shape_of_matrix, spread=True, instead_of=MEAN.name) for half in (0, 1)
)
"""The sums of each half of the samples, for spectra without sampling bias; together they are the sum of all."""
INPUT_SQUARES = Sum("squares", lambda batch: batch.squares / _n_inputs(batch), reduction="batches", of_indices=True)


def _n_inputs(batch: InputBatch) -> int:
    return batch.z__bgti.shape[1] * batch.z__bgti.shape[3]


def mean_energy(matrix: MatrixAccumulator) -> dict[str, float]:
    """Energy and, where per-sample norms are known, signal."""
    totals = [matrix.totals[declared.name] for declared in (MEAN, *HALVES) if declared.name in matrix.totals]
    n = sum(matrix.n_samples)
    energy = matrix.once(
        "energy", lambda: matrix.squared_norm(totals[0] if len(totals) == 1 else totals[0] + totals[1]) / n**2
    )
    if SQUARED_NORMS.name not in matrix.sums:
        return {"energy": energy}
    return {"energy": energy, "signal": energy - (_trace(matrix)["trace"] - energy) / (n - 1)}


def _trace(matrix: MatrixAccumulator) -> dict[str, float]:
    return {"trace": matrix.numbers[SQUARED_NORMS.name] / sum(matrix.n_samples)}


def _input_scale(matrix: MatrixAccumulator) -> dict[str, float]:
    inputs = matrix.inputs
    return {"input_mean_square": inputs.numbers[INPUT_SQUARES.name] / inputs.n_tokens} if inputs.n_tokens else {}


def _two_copies(place: Place) -> int:
    groups, n_out, n_in = place.shape
    return 2 * groups * n_out * n_in


FISHER = Statistic("fisher", lambda place: (SQUARED_NORMS,), result=_trace, fields=("trace",), by_samples=True)
"""The trace of the empirical Fisher, from per-sample norms; the mean gradient is not formed for it."""

GRADIENT = Statistic(
    "gradient", lambda place: (MEAN,), result=mean_energy, fields=("energy", "signal"), working_floats=_two_copies,
    steady=True,
)  # fmt: skip
"""The energy of the mean gradient; together with ``fisher`` also the noise-corrected signal."""

INPUT_SCALE = Statistic(
    "input_scale", input_sums=(INPUT_SQUARES,), result=_input_scale, fields=("input_mean_square",), steady=True
)
"""Mean square of the inputs."""
