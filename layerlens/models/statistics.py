"""What one pass over the calibration data measured, for each layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MethodStatistics:
    """Statistics of the gradient matrix that one PEFT method can move on one layer (DESIGN sections 4 and 5).

    With output gradient d and input z of the option (z = h for LoRA, z = y for an adapter, z = (1, q/√d_head) for a
    prefix), the matrix of sample n is M_n = Σ_t d_t z_tᵀ, and M = mean_n M_n.

    Args:
        energy: ‖M‖²_F.
        trace: mean_n ‖M_n‖²_F; for LoRA this is the empirical Fisher trace.
        signal: ‖M‖² − (trace − ‖M‖²)/(N − 1), the unbiased estimate of the squared norm of the true mean gradient;
            can be < 0.
        input_mean_square: mean of z² over components and tokens.
        spectrum: float64, descending, squared split-half singular values of the whitened matrix (empty when not asked
            for); unbiased, so single values can be < 0.
    """

    energy: float
    trace: float
    signal: float
    input_mean_square: float
    spectrum: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer, one entry for each method that it can take."""

    layer: str
    by_method: dict[str, MethodStatistics]


@dataclass(frozen=True)
class ModelStatistics:
    """Statistics of all layers and what a reader needs to trust them.

    Args:
        layers: one entry per layer of ``spec``, in its order.
        n_samples, n_tokens: calibration samples and unpadded tokens that were measured.
        mean_loss: mean per-sample loss of the frozen model on them.
        activation_bytes: bytes per token that the frozen model keeps for the backward pass (saved-tensor hooks).
        forward_flops: FLOPs of one forward pass of the frozen model, per token.
        provenance: fingerprints, settings and versions, as JSON values.
    """

    layers: tuple[LayerStatistics, ...]
    n_samples: int
    n_tokens: int
    mean_loss: float
    activation_bytes: float
    forward_flops: float
    provenance: dict[str, Any] = field(default_factory=dict)

    def by_name(self) -> dict[str, LayerStatistics]:
        """The layers by their names."""
        return {layer.layer: layer for layer in self.layers}
