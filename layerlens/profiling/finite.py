"""Statistics are finite numbers, or refused; nothing here needs torch."""

from __future__ import annotations

import dataclasses

import numpy as np

from layerlens.exceptions import ProfilingError
from layerlens.models import FactorSketch, ModelStatistics
from layerlens.profiling.declared_tensors import must_be_finite


def refuse_non_finite(statistics: ModelStatistics) -> None:
    """Raise ProfilingError for the first statistic that is NaN or infinite, by layer and name."""
    measured = [(x.layer, f" for {method}", found) for x in statistics.layers for method, found in x.by_method.items()]
    measured += [(name, "", found) for name, found in statistics.other_weights.items()]
    for layer, method, found in measured:
        values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        extra = values.pop("extra") or {}
        for name, value in {**values, **extra}.items():
            if isinstance(value, FactorSketch):
                value = value.values
            if value is not None and not np.all(np.isfinite(value)) and must_be_finite(name):
                raise ProfilingError(
                    f"{layer}: the {name} statistic{method} is not finite; the model overflows on this "
                    "data: look for NaN weights or use a smaller data.max_length"
                )
