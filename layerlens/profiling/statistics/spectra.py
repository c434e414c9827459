"""Spectra of mean gradients, plain and whitened, free of sampling bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.profiling.accumulators import MatrixAccumulator
from layerlens.profiling.statistics import Statistic
from layerlens.profiling.statistics.factors import (
    INPUT_FACTOR,
    OUTPUT_FACTOR,
    exact_factors,
    factor_floats,
    output_factor,
)
from layerlens.profiling.statistics.gradients import HALVES, mean_energy
from layerlens.profiling.sums import Place
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

DAMPING = 1e-2
"""Damping of the K-FAC factors, relative to their mean diagonal."""

MAX_VALUES = 64
"""No option on offer is larger; more singular values would only be stored."""


def split_half_spectrum(
    gradient_1: torch.Tensor,
    gradient_2: torch.Tensor,
    input_factor: torch.Tensor | None = None,
    output_factor: torch.Tensor | None = None,
    damping: float = 0.0,
) -> np.ndarray:
    """Estimated squared singular values of G, or of S^-½ G A^-½, without the bias that noise adds to a plain spectrum.

    The plain estimate σ_i² of a noisy mean gradient is too large, because the singular vectors follow the noise. With
    vectors from one half of the samples and the value from the other, σ_i⁽¹⁾ u_iᵀ G⁽²⁾ v_i is unbiased for the gain
    along (u_i, v_i); the two roles of the halves are averaged. Factors are damped by ``damping`` times their mean
    diagonal and whitened by Cholesky, which has the same singular values as the symmetric root.

    Args:
        gradient_1, gradient_2: float64 [n_out, n_in], mean gradients of the two halves.
        input_factor: float64 [n_in, n_in], A = mean of z zᵀ over tokens, or [n_in], its diagonal where the others are
            0; no whitening without the factors.
        output_factor: float64 [n_out, n_out], S = mean over samples of Σ_t d dᵀ.
        damping: relative, > 0 where factors are given.

    Returns:
        float64, at most 64 values, descending; single values can be negative. Computed on the tensors' device.
    """
    halves = [gradient_1, gradient_2]
    if input_factor is not None and output_factor is not None:
        roots = cholesky_root(output_factor, damping), cholesky_root(input_factor, damping)
        halves = [whiten(gradient, *roots) for gradient in halves]
    estimates = []
    for from_half, to_half in (halves, halves[::-1]):
        left, values, right_t = torch.linalg.svd(from_half, full_matrices=False)
        estimates.append(values * torch.einsum("oi,oi->i", left, to_half @ right_t.mT))
    both = (estimates[0] + estimates[1]) / 2
    return both.sort(descending=True).values[:MAX_VALUES].cpu().numpy().copy()


def whiten(gradient: torch.Tensor, output_root: torch.Tensor, input_root: torch.Tensor) -> torch.Tensor:
    """L_S⁻¹ G L_A⁻ᵀ for lower triangular roots, that of A maybe by its diagonal."""
    left = torch.linalg.solve_triangular(output_root, gradient, upper=False)
    if input_root.dim() == 1:
        return left / input_root
    return torch.linalg.solve_triangular(input_root, left.mT, upper=False).mT


def cholesky_root(factor: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower triangular root of the damped factor; of a diagonal one, given by it, the roots of that."""
    size = factor.shape[0]
    if factor.dim() == 1:
        return (factor + (damping * float(factor.mean()) or 1.0)).sqrt()
    level = damping * float(factor.trace()) / size
    # A factor of nothing but zeros (a module whose gradient vanishes) whitens to zero gain at any positive level.
    eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
    return torch.linalg.cholesky(factor + (level or 1.0) * eye)


def plain_spectrum(matrix: MatrixAccumulator) -> np.ndarray | None:
    """The split-half spectrum of all heads together, computed once; None where a half has no samples."""
    if 0 in matrix.n_samples:
        return None
    return matrix.once("plain spectrum", lambda: _of_heads(_halves(matrix)))


def _halves(matrix: MatrixAccumulator) -> list[torch.Tensor]:
    """Mean gradients of each half, float64 [g, o, i]."""
    totals = [matrix.totals[declared.name] for declared in HALVES]
    return matrix.once(
        "halves", lambda: [total.double() / n for total, n in zip(totals, matrix.n_samples, strict=True)]
    )


def _of_heads(halves: list[torch.Tensor], factors: tuple[torch.Tensor, torch.Tensor] | None = None) -> np.ndarray:
    """Spectra of all heads, descending; whitened with the factors."""
    found = []
    for head, (first, second) in enumerate(zip(*halves, strict=True)):
        a, s = (factors[0][head], factors[1][head]) if factors else (None, None)
        found.append(split_half_spectrum(first, second, a, s, DAMPING))
    return np.sort(np.concatenate(found))[::-1].copy()


def _spectrum(matrix: MatrixAccumulator) -> dict[str, Any]:
    plain = plain_spectrum(matrix)
    return mean_energy(matrix) | ({} if plain is None else {"plain_spectrum": plain})


def _whitened(matrix: MatrixAccumulator) -> dict[str, Any]:
    energy = mean_energy(matrix)
    if 0 in matrix.n_samples or OUTPUT_FACTOR.name not in matrix.totals:
        return energy
    halves, factors = _halves(matrix), exact_factors(matrix)
    assert factors is not None
    if matrix.place.looked_up:  # its sums have the inputs first
        halves = [half.mT for half in halves]
    # The halves are in main memory where the sums were spread over processes.
    place = halves[0].device
    return energy | {"spectrum": _of_heads(halves, (factors[0].to(place), factors[1].to(place)))}


def eight_copies(place: Place) -> int:
    """float64 numbers that a split-half spectrum takes: both halves, and their factorisations."""
    groups, n_out, n_in = place.shape
    return 8 * groups * n_out * n_in


SPECTRUM = Statistic(
    "spectrum",
    lambda place: HALVES,
    result=_spectrum,
    fields=("plain_spectrum", "energy", "signal"),
    working_floats=eight_copies,
)
"""Split-half spectrum of the mean gradient."""

WHITENED_SPECTRUM = Statistic(
    "whitened_spectrum", lambda place: (*HALVES, output_factor(place)), (INPUT_FACTOR,), _whitened,
    fields=("spectrum", "energy", "signal"),
    working_floats=lambda place: eight_copies(place) + factor_floats(place),
)  # fmt: skip
"""The same of S^-½ G A^-½ with the exact K-FAC factors."""
