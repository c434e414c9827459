"""Utility models that were tried for the default, beside those of the product. All multiply with a concave law of rank.

S = noise-corrected gradient energy, T = Fisher trace (mean squared norm of a sample's gradient).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from layerlens.models import MethodStatistics, ModelSpec, ModelStatistics, Option

TRAINING_BATCH = 8


def _table(
    spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option], score: Callable[[MethodStatistics], float],
    law: Callable[[float], float] = np.sqrt, shape: Callable[[int, int], float] = lambda n_in, n_out: 1.0,
) -> np.ndarray:  # fmt: skip
    by_layer, layers = statistics.by_name(), {layer.name: layer for layer in spec.layers}
    scores = {name: score(by_layer[name].by_method["lora"]) * shape(layer.n_in, layer.n_out)
              for name, layer in layers.items()}  # fmt: skip
    return np.array([scores[option.layer] * law(option.rank) if option.rank else 0.0 for option in options])


def _signal(measured: MethodStatistics) -> float:
    return max(0.0, measured.signal or 0.0)


def adam(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """S / √(S + T/b) · √r: the first-order gain of Adam, whose steps are divided by the gradients' root mean square."""
    return _table(spec, statistics, options, lambda m: _signal(m) / np.sqrt(_signal(m) + (m.trace or 1.0) / 8))


def mixed(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """(√S / mean √S + 1)/2 · √r: half-way (arithmetically) between `signal` and even spreading."""
    mean = np.mean([np.sqrt(_signal(layer.by_method["lora"])) for layer in statistics.layers])
    return _table(spec, statistics, options, lambda m: 0.5 * np.sqrt(_signal(m)) / mean + 0.5)


def adam_shape(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """√(S·n_out/n_in) · √r: first step of Adam on B with random A (ΔL ∝ Σ_o ‖G_o‖·r/√n_in, rows taken as equal)."""
    return _table(
        spec, statistics, options, lambda m: np.sqrt(_signal(m)), shape=lambda n_in, n_out: np.sqrt(n_out / n_in)
    )


def nuclear(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """Σ_{i≤r} √λ_i⁺ with the split-half spectrum λ of the mean gradient: steps of equal size in every direction."""
    by_layer = statistics.by_name()
    sums = {name: np.cumsum(np.sqrt(np.maximum(layer.by_method["lora"].plain_spectrum, 0.0)))
            for name, layer in by_layer.items()}  # fmt: skip
    return np.array([sums[o.layer][min(o.rank, len(sums[o.layer])) - 1] if o.rank else 0.0 for o in options])


def signal_log(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """√S · log₂(1 + r): a law that falls faster, so that rank is spread over more layers."""
    return _table(spec, statistics, options, lambda m: np.sqrt(_signal(m)), law=lambda r: np.log2(1.0 + r))


def root_parameters(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """E^¼ · √(r·(n_in + n_out)): a concave law of parameters instead of ranks, so that parameters ∝ √E."""
    return _table(
        spec, statistics, options, lambda m: (m.energy or 0.0) ** 0.25, shape=lambda n_in, n_out: np.sqrt(n_in + n_out)
    )


def even_ranks(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """E^¼ · (n_in + n_out) · √r: rank ∝ √E; with equal E this is uniform LoRA, where ``root_parameters`` is not."""
    return _table(
        spec, statistics, options, lambda m: (m.energy or 0.0) ** 0.25, shape=lambda n_in, n_out: n_in + n_out
    )


def even_ranks_eighth(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """E^⅛ · (n_in + n_out) · √r: rank ∝ E^¼, half-way between ``even_ranks`` and uniform LoRA."""
    return _table(
        spec, statistics, options, lambda m: (m.energy or 0.0) ** 0.125, shape=lambda n_in, n_out: n_in + n_out
    )


def log_half(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """E^½ · (n_in + n_out) · log(1 + r): like ``tempered_log``, with r + 1 ∝ √E."""
    return _table(
        spec, statistics, options, lambda m: (m.energy or 0.0) ** 0.5, np.log1p, lambda n_in, n_out: n_in + n_out
    )


def log_three_eighths(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """E^⅜ · (n_in + n_out) · log(1 + r): half-way between ``tempered_log`` and ``log_half``."""
    return _table(
        spec, statistics, options, lambda m: (m.energy or 0.0) ** 0.375, np.log1p, lambda n_in, n_out: n_in + n_out
    )


CANDIDATES = {
    function.__name__: function
    for function in (
        adam,
        mixed,
        adam_shape,
        nuclear,
        signal_log,
        root_parameters,
        even_ranks,
        even_ranks_eighth,
        log_half,
        log_three_eighths,
    )
}
