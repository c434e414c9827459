"""Two measurements of the same: which statistics must agree in every bit, and which to what rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from layerlens.models import FactorSketch, MethodStatistics, ModelStatistics
from layerlens.profiling.statistics_file import load_statistics

SAME_BITS = ("trace", "input_mean_square")
"""Sums of one number for each sample or batch, which are added in the order of the batches."""

TOLERANCE = {
    # float32 sums of 9 batches in another order: each entry of a matrix is off by a few 6e-8 of its largest terms.
    "energy": 1e-6, "signal": 1e-6, "plain_spectrum": 1e-6, "input_factor": 1e-6, "output_factor": 1e-6,
    "input_sketch": 1e-6, "output_sketch": 1e-6, "sketched_spectrum": 1e-6, "sketch_error": 1e-6,
    # whitening with a damping of 1e-2 of the mean diagonal amplifies that by up to the condition number of a factor,
    # 1e2 · (largest eigenvalue / mean), twice.
    "spectrum": 1e-3,
}  # fmt: skip


def differences(one: MethodStatistics, other: MethodStatistics) -> dict[str, float]:
    """Largest difference of every statistic, relative to its largest value; of sketches that of the eigenvalues."""
    found = {}
    for field in dataclasses.fields(one):
        first, second = getattr(one, field.name), getattr(other, field.name)
        assert (first is None) == (second is None), field.name
        if isinstance(first, FactorSketch):
            first, second = first.values, second.values
        if first is not None and np.size(first):
            scale = max(float(np.max(np.abs(first))), 1e-30)
            found[field.name] = float(np.max(np.abs(np.asarray(first) - np.asarray(second)))) / scale
    return found


def assert_same_measurement(one: ModelStatistics, other: ModelStatistics, *, exact: bool = False) -> None:
    """``exact``: every statistic in every bit."""
    assert (other.n_samples, other.n_tokens, other.mean_loss) == (one.n_samples, one.n_tokens, one.mean_loss)
    assert (other.activation_bytes, other.forward_flops) == (one.activation_bytes, one.forward_flops)
    assert one.kernel is not None
    assert other.kernel is not None
    assert np.array_equal(other.kernel.gram, one.kernel.gram)
    assert other.kernel.target_alignment == one.kernel.target_alignment
    assert list(other.other_weights) == list(one.other_weights)
    assert (other.left_out, other.coverage) == (one.left_out, one.coverage)
    pairs = [
        (x, y) for a, b in zip(one.layers, other.layers, strict=True)
        for x, y in zip(a.by_method.values(), b.by_method.values(), strict=True)
    ] + [(one.other_weights[name], other.other_weights[name]) for name in one.other_weights]  # fmt: skip
    seen = set()
    for first, second in pairs:
        for name, difference in differences(first, second).items():
            seen.add(name)
            assert difference <= (0.0 if exact or name in SAME_BITS else TOLERANCE[name]), name
    assert seen == {*SAME_BITS, *TOLERANCE}


def statistics_in(folder: Path) -> ModelStatistics:
    return load_statistics(folder / "statistics.safetensors")[1]
