"""The utility models by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.exceptions import ProfilingError
from layerlens.models import LORA, ModelSpec, ModelStatistics, Option, UtilityTable
from layerlens.registry import STATISTICS
from layerlens.utility import spectral
from layerlens.utility.calibration import calibrate
from layerlens.utility.spectral import marginal_parameters
from layerlens.utility.weighted import metrics_of, weighted_table

STATISTIC_OF = {"gradient_energy": "gradient", "fisher": "fisher"}
"""Metric of ``metric_weights`` -> the statistic that it is."""


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
    "tempered_log": UtilityModel(
        spectral.tempered_log,
        "relative gain (fourth root of the gradient energy × parameters)",
        ("gradient", "input_scale"),
    ),
    "signal": UtilityModel(spectral.signal, "relative gain (root of the noise-corrected gradient energy)", SIGNAL),
    "whitened": UtilityModel(spectral.whitened, "predicted loss drop, nats per sample", ("whitened_spectrum",)),
    "gradient": UtilityModel(
        spectral.gradient, "relative gain (root of the gradient energy)", ("gradient", "input_scale")
    ),
    "uniform": UtilityModel(spectral.uniform, "relative gain (every layer equal)"),
}


AUTO = "auto"
"""Utility model that depends on the budget: see ``model_for``."""
SPREAD_FROM = 2.0
"""Ranks on every layer that a budget must pay for before it is spread by ``tempered_log``."""


def model_for(name: str, spec: ModelSpec, max_trainable_params: float | None) -> str:
    """``name``, or what "auto" means for a budget of trainable parameters.

    ``tempered_energy`` (parameters go to few, mostly narrow layers) for budgets below rank 2 on every layer;
    ``tempered_log`` (ranks become alike) for larger budgets, and where parameters are not limited at all. Which law is
    right where was measured at one and four ranks for each layer (docs/decisions.md, Utility).
    """
    if name != AUTO:
        return name
    taking = [layer for layer in spec.layers if LORA in layer.methods] or [x for x in spec.layers if x.methods]
    methods = [LORA if LORA in layer.methods else layer.methods[0] for layer in taking]
    unit = sum(marginal_parameters(layer, method) for layer, method in zip(taking, methods, strict=True))
    tight = max_trainable_params is not None and max_trainable_params < SPREAD_FROM * unit
    return "tempered_energy" if tight else "tempered_log"


def needed_statistics(name: str, metric_weights: Mapping[str, float], *, proxies: bool = False) -> tuple[str, ...]:
    """The statistics that the utility model ``name`` reads; those of "weighted" follow from its weights.

    With ``proxies`` the metric proxy_eval is there too: measured gains, carried to all layers along the signal.

    >>> needed_statistics("weighted", {"fisher": 1.0})
    ('fisher',)
    """
    if name == "weighted":
        wanted = {metric for metric, weight in metric_weights.items() if weight > 0.0}
        needed = {STATISTIC_OF[metric] for metric in wanted & set(STATISTIC_OF)}
        return tuple(sorted(needed | set(SIGNAL if proxies and "proxy_eval" in wanted else ())))
    if name == AUTO:
        return tuple(dict.fromkeys(UTILITY_MODELS["tempered_energy"].needs + UTILITY_MODELS["tempered_log"].needs))
    return UTILITY_MODELS[name].needs


def has_statistic(statistics: ModelStatistics, name: str) -> bool:
    """Whether any layer has the statistic ``name``."""
    found = [measured for layer in statistics.layers for measured in layer.by_method.values()]
    values = [measured.value(field) for measured in found for field in STATISTICS[name].fields[:1]]
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
        metrics = metrics_of(statistics)
        if statistics.proxies and metric_weights.get("proxy_eval"):
            for layer, gain in _proxy_gains(spec, statistics, options).items():
                metrics[layer]["proxy_eval"] = gain
        return weighted_table(spec, metrics, options, metric_weights)
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


def calibrated_table(
    name: str,
    spec: ModelSpec,
    statistics: ModelStatistics,
    options: Sequence[Option],
    metric_weights: Mapping[str, float],
    *,
    seed: int = 0,
) -> UtilityTable:
    """``utility_table`` as predicted loss drops, by the proxies of ``statistics``; as it is where there are none.

    Raises:
        ProfilingError: the statistics lack what the model needs.
    """
    study = statistics.proxies
    if study is None:
        return utility_table(name, spec, statistics, options, metric_weights)
    trained = [one.option for one in study.gains]  # maybe of ranks that are no longer on offer
    together = tuple(dict.fromkeys((*options, *trained)))
    found = calibrate(utility_table(name, spec, statistics, together, metric_weights), study, seed=seed)
    return found.first(len(options))


def _proxy_gains(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> dict[str, float]:
    """Loss drop of each layer's best option: the proxies' gains, carried to all layers along the signal."""
    table = calibrated_table("signal", spec, statistics, options, {})
    best = {layer.name: 0.0 for layer in spec.layers}
    for option, gain in zip(table.options, table.utility, strict=True):
        best[option.layer] = max(best[option.layer], float(gain))
    return best
