"""Summaries of the empirical neural tangent kernel K[n, m] = ⟨g_n, g_m⟩ (Jacot et al. 2018, arXiv:1806.07572)."""

from __future__ import annotations

import numpy as np

from layerlens.models import KernelStatistics


def kernel_statistics(grams: np.ndarray, labels: np.ndarray) -> KernelStatistics:
    """Trace, effective rank and alignment with the targets.

    From several independent estimates of the kernel, their mean is the kernel; ‖K‖² comes from products of different
    ones, which are free of the sketches' noise, and the error of the mean from how they differ.

    Args:
        grams: float64 [sketches, n, n], inner products of the per-sample loss gradients.
        labels: [n], class of each sample; of another type or shape when the targets are no classes.

    >>> found = kernel_statistics(np.eye(4)[None], np.array([0, 0, 1, 1]))
    >>> found.trace, found.effective_rank, found.relative_error
    (4.0, 4.0, 0.0)
    """
    gram, sketches = grams.mean(axis=0), len(grams)
    trace = float(np.trace(gram))
    energy, error = float(np.square(gram).sum()), 0.0
    if sketches > 1:
        alone = float(np.square(grams).sum()) / sketches
        spread = (alone - energy) / (sketches - 1)  # variance of the mean, summed over the entries
        energy -= spread
        error = float(np.sqrt(max(spread, 0.0) / energy)) if energy > 0.0 else 1.0
    classes = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    alignment = centred_alignment(gram, labels[:, None] == labels[None, :]) if classes else None
    return KernelStatistics(gram, trace, trace**2 / energy if energy > 0.0 else 0.0, alignment, error)


def centred_alignment(one: np.ndarray, other: np.ndarray) -> float | None:
    """⟨HKH, HLH⟩ / (‖HKH‖ ‖HLH‖), H = I − 11ᵀ/n (Cortes et al. 2012); None where either vanishes.

    >>> round(centred_alignment(np.eye(3), np.eye(3)), 12)
    1.0
    """
    centred = []
    for kernel in (one.astype(np.float64), other.astype(np.float64)):
        centred.append(kernel - kernel.mean(axis=0) - kernel.mean(axis=1, keepdims=True) + kernel.mean())
    norms = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float((centred[0] * centred[1]).sum()) / norms if norms > 0.0 else None
