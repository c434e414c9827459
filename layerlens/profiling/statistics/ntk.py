"""The empirical neural tangent kernel K[n, m] = ⟨g_n, g_m⟩ of the layers' own weights (Jacot et al. 2018, 1806.07572).

Exact from kept activations and gradients for up to 256 samples. Beyond, every sample's gradient is a few random
projections: a layer's g_n = Σ_t d_t z_tᵀ is seen through pairs, (ψᵀ d_t)(z_tᵀ ω) for p signs ψ and q signs ω, whose
products have the expectation ⟨g_n, g_m⟩ (Kronecker sketch; Ahle et al. 2020, arXiv:1909.01821). Layers have signs of
their own, so their features can be added up: what layers add to each other has expectation 0. Four such sketches that
share no sign tell, by how they differ, how far their mean is off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.exceptions import ProfilingError
from layerlens.models import LORA, KernelStatistics
from layerlens.profiling.accumulators import MatrixAccumulator
from layerlens.profiling.sample_matrices import SampleMatrices, gram_matrix
from layerlens.profiling.statistics import ModelSums, Statistic
from layerlens.profiling.sums import MatrixBatch, Place, Sum
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

BLOCKS, SIDE = 4, 16
"""Independent sketches, and the projections on each side of one: 4 × 16² features for each sample."""
KEPT, FEATURES = "kernel samples", "kernel features"


def _sums(place: Place) -> tuple[Sum, ...]:
    """Of the layers' own weights: adapters' and prefixes' matrices have no part in the kernel."""
    if place.method != LORA:
        return ()
    if place.kernel_sketched:
        return (Sum(FEATURES, features, reduction="layers", has=lambda batch: batch.has_features, projects=True),)

    def first(batch: MatrixBatch) -> dict[str, torch.Tensor]:
        return batch.matrices.head(place.kernel_samples - batch.before) if batch.before < place.kernel_samples else {}

    def shape(place: Place) -> tuple[int, ...]:
        return place.kernel_samples, place.tokens, 2 + place.shape[2] if place.looked_up else sum(place.shape[1:])

    return (Sum(KEPT, first, shape, reduction="samples"),)


def features(batch: MatrixBatch) -> torch.Tensor:
    """One layer's features of the samples, [b, BLOCKS, SIDE²] float32 or wider."""
    p__btl, q__btk = batch.projected_d__btl, batch.projected_z__btk
    b, t = p__btl.shape[:2]
    wide = torch.promote_types(p__btl.dtype, torch.float32)
    p__bxtu, q__bxtv = (
        x[..., : BLOCKS * SIDE].to(wide).view(b, t, BLOCKS, SIDE).transpose(1, 2) for x in (p__btl, q__btk)
    )
    return (p__bxtu.mT @ q__bxtv).flatten(2) / SIDE


def kept_samples(matrix: MatrixAccumulator) -> list[SampleMatrices]:
    """What is kept of the samples for the exact kernel, in the order of the batches."""
    return [SampleMatrices(**factors) for _, factors in sorted(matrix.kept.get(KEPT, {}).items())]


def _part(matrix: MatrixAccumulator) -> np.ndarray | None:
    return gram_matrix(kept_samples(matrix), matrix.threads) if KEPT in matrix.sums else None


def _kernel(model: ModelSums) -> dict[str, Any]:
    """The kernel of the first samples of the batches, in the order that they have in the calibration set.

    Raises:
        ProfilingError: there are no layers with a part in it.
    """
    count = model.kernel_samples
    if FEATURES in model.rows.done:
        features__xnf = model.rows.joined(FEATURES)[:count].transpose(0, 1).double()
        grams = (features__xnf @ features__xnf.mT).cpu().numpy()
    elif model.parts:
        grams = np.sum(model.parts, axis=0)[None]
    else:
        raise ProfilingError("ntk: the model has no layer that LoRA can adapt, so there is no kernel")
    order = torch.cat(list(model.index))[:count].argsort().numpy()
    known = [part for part in model.labels if part is not None]
    comparable = len(known) == len(model.labels)
    of_samples = torch.cat(known)[:count].numpy()[order] if comparable else np.zeros((0, 0))
    return {"kernel": kernel_statistics(grams[:, order][:, :, order], of_samples)}


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


STATISTIC = Statistic("ntk", _sums, part=_part, model_result=_kernel, fields=("kernel",), by_samples=True)
