"""The neural tangent kernel of more samples than can be kept: every sample's gradient as a few random projections.

A layer's gradient g_n = Σ_t d_t z_tᵀ is seen through pairs of projections, (ψᵀ d_t)(z_tᵀ ω) for p signs ψ and q signs
ω, whose products have the expectation ⟨g_n, g_m⟩ (Kronecker sketch; Ahle et al. 2020, arXiv:1909.01821). Layers have
signs of their own, so their features can be added up: what layers add to each other has expectation 0. Four such
sketches that share no sign tell, by how they differ, how far their mean is off.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCKS, SIDE = 4, 16
"""Independent sketches, and the projections on each side of one: 4 × 16² features for each sample."""


class KernelSketch:
    """Features of the samples so far, [n, BLOCKS, SIDE²] float32 or wider."""

    def __init__(self) -> None:
        self.done: dict[int, torch.Tensor] = {}
        self.current: torch.Tensor | None = None

    def add(self, p__btl: torch.Tensor, q__btk: torch.Tensor) -> None:
        """Add one layer's features of the batch: projections of gradients and inputs, of which BLOCKS·SIDE are used."""
        b, t = p__btl.shape[:2]
        wide = torch.promote_types(p__btl.dtype, torch.float32)
        p__bxtu, q__bxtv = (
            x[..., : BLOCKS * SIDE].to(wide).view(b, t, BLOCKS, SIDE).transpose(1, 2) for x in (p__btl, q__btk)
        )
        features__bxf = (p__bxtu.mT @ q__bxtv).flatten(2) / SIDE
        self.current = features__bxf if self.current is None else self.current.add_(features__bxf)

    def end_batch(self, before: int) -> None:
        """All layers of the batch, which ``before`` samples come before, are in."""
        if self.current is not None:
            self.done[before] = self.current
            self.current = None

    def grams(self, count: int) -> np.ndarray:
        """The Gram matrix of the first ``count`` samples by each sketch, float64 [BLOCKS, n, n]."""
        features__xnf = torch.cat([self.done[before] for before in sorted(self.done)])[:count].transpose(0, 1).double()
        return (features__xnf @ features__xnf.mT).cpu().numpy()
