"""The utility models by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.exceptions import ProfilingError
from layerlens.models import ModelSpec, ModelStatistics, Option, UtilityTable
from layerlens.utility import spectral
from layerlens.utility.weighted import metrics_of, weighted_table

STATISTIC_OF = {"gradient_energy": "gradient", "fisher": "fisher"}
"""Metric of ``metric_weights`` -> the statistic that it is."""

FIELD_OF = {
    "fisher": "trace",
    "gradient": "energy",
    "input_scale": "input_mean_square",
    "spectrum": "plain_spectrum",
    "whitened_spectrum": "spectrum",
}
"""Statistic -> the field of MethodStatistics that has it."""


@dataclass(frozen=True)
class UtilityModel:
    """A utility model and what it needs.

    Args:
        function: (spec, statistics, options) -> float64 [n_options].
        unit: what its values are measured in.
        needs: the statistics it reads, by their names in ``profiling.statistics``.
    """

    function: Callable[[ModelSpec, ModelStatistics, Sequence[Option]], np.ndarray]
    unit: str
    needs: tuple[str, ...] = ()


SIGNAL = ("fisher", "gradient", "input_scale")
UTILITY_MODELS: dict[str, UtilityModel] = {
    "tempered": UtilityModel(spectral.tempered, "relative gain (fourth root of the noise-corrected energy)", SIGNAL),
    "tempered_energy": UtilityModel(
        spectral.tempered_energy, "relative gain (fourth root of the gradient energy)", ("gradient", "input_scale")
    ),
    "signal": UtilityModel(spectral.signal, "relative gain (root of the noise-corrected gradient energy)", SIGNAL),
    "whitened": UtilityModel(spectral.whitened, "predicted loss drop, nats per sample", ("whitened_spectrum",)),
    "gradient": UtilityModel(
        spectral.gradient, "relative gain (root of the gradient energy)", ("gradient", "input_scale")
    ),
    "uniform": UtilityModel(spectral.uniform, "relative gain (every layer equal)"),
}


def needed_statistics(name: str, metric_weights: Mapping[str, float]) -> tuple[str, ...]:
    """The statistics that the utility model ``name`` reads; those of "weighted" follow from its weights.

    >>> needed_statistics("weighted", {"fisher": 1.0})
    ('fisher',)
    """
    if name == "weighted":
        wanted = {metric for metric, weight in metric_weights.items() if weight > 0.0}
        return tuple(STATISTIC_OF[metric] for metric in sorted(wanted & set(STATISTIC_OF)))
    return UTILITY_MODELS[name].needs


def has_statistic(statistics: ModelStatistics, name: str) -> bool:
    """Whether any layer has the statistic ``name``."""
    found = [measured for layer in statistics.layers for measured in layer.by_method.values()]
    values = [getattr(measured, FIELD_OF[name]) for measured in found]
    return any(value is not None and np.size(value) > 0 for value in values)


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
    lacking = [need for need in model.needs if not has_statistic(statistics, need)]
    if lacking:
        usable = [
            other for other, its in UTILITY_MODELS.items() if all(has_statistic(statistics, x) for x in its.needs)
        ]
        raise ProfilingError(
            f"profiling.utility_model: {name!r} needs the statistic {lacking[0]!r}, which these statistics lack; run "
            f"`layerlens run` with utility_model: {name}, or choose {', '.join(usable)}"
        )
    return UtilityTable(tuple(options), model.function(spec, statistics, options), name, model.unit)
