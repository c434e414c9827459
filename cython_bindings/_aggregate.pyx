"""Weighted, normalised combination of metrics over layers (cpp/aggregate)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from aggregate cimport c_aggregate_scores


def aggregate_scores(
    object metrics: Mapping[str, object], object weights: Mapping[str, float], object layers: Sequence[str] | None = None
) -> np.ndarray:
    """One score per layer, float64 [layers]: sum_m w_m x_ml / max_l |x_ml|, with the weights scaled to sum 1.

    ``metrics``: name -> one value per layer. ``weights``: name -> weight, finite and not negative; a metric without a
    weight counts nothing. ``layers``: names of the layers, for messages. A metric that is zero everywhere adds zero.

    Raises ValueError if a value is NaN or infinite (naming metric and layer), if lengths differ, if a weight is wrong
    or names no metric, or if no weight is positive.

    >>> aggregate_scores({"energy": [1.0, 4.0], "fisher": [2.0, 2.0]}, {"energy": 1.0, "fisher": 3.0})
    array([0.8125, 1.    ])
    """
    cdef list names = [name for name in metrics if weights.get(name, 0.0) != 0.0]
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"the weight of {name} must be finite and not negative, got {weight!r}")
        if name not in metrics:
            raise ValueError(f"weights names {name!r}, which is no metric; there are: {', '.join(metrics)}")
    if not names:
        raise ValueError("no metric has a positive weight: nothing to aggregate")
    rows = [np.asarray(metrics[name], dtype=np.float64) for name in names]
    cdef Py_ssize_t count = len(rows[0]) if rows[0].ndim == 1 else -1, expected = count, bad
    if layers is not None:
        expected = len(layers)
    for name, row in zip(names, rows, strict=True):
        if row.shape != (expected,):
            raise ValueError(f"metric {name} must have one value for each of {expected} layers, got shape {row.shape}")
    scores = np.zeros(expected)
    if expected == 0:
        return scores
    cdef double[:, ::1] c_metrics = np.array(rows)
    cdef double[::1] c_weights = np.array([weights[name] for name in names], dtype=np.float64), c_scores = scores
    bad = c_aggregate_scores(&c_metrics[0, 0], &c_weights[0], len(names), expected, &c_scores[0])
    if bad >= 0:
        layer = f"layer {bad % expected}" if layers is None else layers[bad % expected]
        raise ValueError(f"{names[bad // expected]} of {layer} is {c_metrics[bad // expected, bad % expected]}")
    return scores
