"""Spectra of mean gradients, plain and whitened, free of sampling bias."""

from __future__ import annotations

import numpy as np
import scipy.linalg

MAX_VALUES = 64
"""No option on offer is larger; more singular values would only be stored."""


def split_half_spectrum(
    gradient_1: np.ndarray,
    gradient_2: np.ndarray,
    input_factor: np.ndarray | None = None,
    output_factor: np.ndarray | None = None,
    damping: float = 0.0,
) -> np.ndarray:
    """Estimated squared singular values of G, or of S^-½ G A^-½, without the bias that noise adds to a plain spectrum.

    The plain estimate σ_i² of a noisy mean gradient is too large, because the singular vectors follow the noise. With
    vectors from one half of the samples and the value from the other, σ_i⁽¹⁾ u_iᵀ G⁽²⁾ v_i is unbiased for the gain
    along (u_i, v_i); the two roles of the halves are averaged. Factors are damped by ``damping`` times their mean
    diagonal and whitened by Cholesky, which has the same singular values as the symmetric root.

    Args:
        gradient_1, gradient_2: float64 [n_out, n_in], mean gradients of the two halves.
        input_factor: float64 [n_in, n_in], A = mean of z zᵀ over tokens; no whitening without the factors.
        output_factor: float64 [n_out, n_out], S = mean over samples of Σ_t d dᵀ.
        damping: relative, > 0 where factors are given.

    Returns:
        float64, at most 64 values, descending; single values can be negative.
    """
    halves = [gradient_1, gradient_2]
    if input_factor is not None and output_factor is not None:
        roots = _cholesky(output_factor, damping), _cholesky(input_factor, damping)
        halves = [_whiten(gradient, *roots) for gradient in halves]
    estimates = []
    for from_half, to_half in (halves, halves[::-1]):
        left, values, right_t = scipy.linalg.svd(from_half, full_matrices=False, check_finite=False)
        estimates.append(values * np.einsum("oi,oi->i", left, to_half @ right_t.T))
    return np.sort((estimates[0] + estimates[1]) / 2)[::-1][:MAX_VALUES].copy()


def _whiten(gradient: np.ndarray, output_root: np.ndarray, input_root: np.ndarray) -> np.ndarray:
    left = scipy.linalg.solve_triangular(output_root, gradient, lower=True)
    return scipy.linalg.solve_triangular(input_root, left.T, lower=True).T


def _cholesky(factor: np.ndarray, damping: float) -> np.ndarray:
    size = factor.shape[0]
    level = damping * float(np.trace(factor)) / size
    # A factor of nothing but zeros (a module whose gradient vanishes) whitens to zero gain at any positive level.
    return scipy.linalg.cholesky(factor + (level or 1.0) * np.eye(size), lower=True)
