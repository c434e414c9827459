"""Profiling: statistics of every layer from one pass over the calibration data, and the cache that keeps them.

::

    texts -> Batch ... -> Capture (taps on every module) -> declared sums -> MethodStatistics -> ModelStatistics

Where you have per-sample gradients of your own, ``activation_cache_from_gradients`` makes the scalars of them that
``layerlens.pipeline.run_pipeline`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layerlens import kernels
from layerlens.exceptions import ActivationCacheError


def activation_cache_from_gradients(
    per_sample_gradients: Mapping[str, Any], *, threads: int = 1
) -> dict[str, dict[str, float]]:
    """Compute the activation cache for ``run_pipeline`` from per-sample gradients.

    Args:
        per_sample_gradients: layer -> gradients [samples, ...] of each sample's loss with respect to the layer's
            weight: NumPy arrays or CPU tensors in float32, float64, bfloat16 or float16.
        threads: number of threads of the kernels.

    Returns:
        {layer: {"grad_norm": ‖mean_n g_n‖, "fisher_trace": mean_n ‖g_n‖²}}. ``fisher_trace`` is the trace of the
        empirical Fisher information.

    Raises:
        ActivationCacheError: a layer has no samples, another dtype, or values that are NaN or infinite. The message
            names the layer.

    >>> activation_cache_from_gradients({"layer": np.array([[3.0, 0.0], [3.0, 8.0]])})
    {'layer': {'grad_norm': 5.0, 'fisher_trace': 41.0}}
    """
    cache = {}
    for layer, gradients in per_sample_gradients.items():
        try:
            rows__np = gradients.reshape(len(gradients), -1) if len(gradients) else gradients.reshape(0, 1)
            trace = kernels.fisher_trace(rows__np, threads=threads)
            total = np.zeros(rows__np.shape[1])
            for row in rows__np:
                total += np.asarray(row.double() if hasattr(row, "double") else row, dtype=np.float64)
        except (TypeError, ValueError, AttributeError) as error:
            raise ActivationCacheError(f"{layer}: per-sample gradients [samples, ...] are needed: {error}") from error
        norm = float(np.sqrt(kernels.gradient_energy(total / len(rows__np), threads=threads)))
        if not np.isfinite([norm, trace]).all():
            raise ActivationCacheError(f"{layer}: the gradient of a sample is not finite; leave the sample out")
        cache[layer] = {"grad_norm": norm, "fisher_trace": trace}
    return cache
