"""The utility models by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.exceptions import ProfilingError
from layerlens.models import ModelSpec, ModelStatistics, Option, UtilityTable
from layerlens.utility import spectral
from layerlens.utility.weighted import metrics_of, weighted_table


@dataclass(frozen=True)
class UtilityModel:
    """A utility model and what it needs.

    Args:
        function: (spec, statistics, options) -> float64 [n_options].
        unit: what its values are measured in.
        needs_factors: whether the statistics must have whitened spectra.
    """

    function: Callable[[ModelSpec, ModelStatistics, Sequence[Option]], np.ndarray]
    unit: str
    needs_factors: bool = False


UTILITY_MODELS: dict[str, UtilityModel] = {
    "signal": UtilityModel(spectral.signal, "relative gain (root of the noise-corrected gradient energy)"),
    "whitened": UtilityModel(spectral.whitened, "predicted loss drop, nats per sample", needs_factors=True),
    "gradient": UtilityModel(spectral.gradient, "relative gain (root of the gradient energy)"),
    "uniform": UtilityModel(spectral.uniform, "relative gain (every layer equal)"),
}


def needs_factors(name: str) -> bool:
    """Whether the utility model ``name`` needs whitened spectra."""
    return name in UTILITY_MODELS and UTILITY_MODELS[name].needs_factors


def utility_table(
    name: str,
    spec: ModelSpec,
    statistics: ModelStatistics,
    options: Sequence[Option],
    metric_weights: Mapping[str, float],
) -> UtilityTable:
    """The utility of every option by the model ``name``; ``metric_weights`` counts for "weighted" only.

    Raises:
        ProfilingError: the statistics lack what the model needs.
    """
    if name == "weighted":
        return weighted_table(spec, metrics_of(statistics), options, metric_weights)
    model = UTILITY_MODELS[name]
    if model.needs_factors and not any(
        len(measured.spectrum) for layer in statistics.layers for measured in layer.by_method.values()
    ):
        raise ProfilingError(
            f"profiling.utility_model: {name!r} needs whitened spectra, which these statistics lack; run "
            f"`layerlens run` with utility_model: {name}, or choose signal, gradient, weighted or uniform"
        )
    return UtilityTable(tuple(options), model.function(spec, statistics, options), name, model.unit)
