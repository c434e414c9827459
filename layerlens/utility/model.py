"""``UtilityModel``: a function of the statistics, its unit, and the statistics that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerlens.exceptions import ProfilingError
from layerlens.models import ModelSpec, ModelStatistics, Option, UtilityTable
from layerlens.registry import STATISTICS, UTILITY_MODELS
from layerlens.utility.calibration import calibrate

SURE = 0.1
"""Of the width of an interval: a set that is said to keep nearly all is known better than one that is said to keep
half, and none is known without error."""
MOST_KEPT = 1.17
"""The largest share that any choice of the study kept; no interval goes further."""


@dataclass(frozen=True)
class UtilityModel:
    """A utility model.

    Args:
        name: name in the registry.
        function: (spec, statistics, options) -> utilities, float64 [n_options].
        unit: unit of the utilities.
        needs: names of the statistics that it reads, as in the registry.
        set_power: the gain of a set of options is the sum of their utilities to this power.
        set_error: (below, above), error of the predicted share of uniform LoRA's gain that a set keeps, in units of
            ``SURE + |1 − share|``; None if it was not measured.
    """

    name: str
    function: Callable[[ModelSpec, ModelStatistics, Sequence[Option]], np.ndarray]
    unit: str
    needs: tuple[str, ...] = ()
    set_power: float = 1.0
    set_error: tuple[float, float] | None = None

    def kept_interval(self, kept: float) -> tuple[float, float] | None:
        """Where the share that a set keeps lay in nine of ten cases of the study whose prediction was ``kept``."""
        if self.set_error is None:
            return None
        (below, above), unit = self.set_error, SURE + abs(1.0 - kept)
        return max(0.0, kept - below * unit), max(kept, min(kept + above * unit, MOST_KEPT))

    def for_budget(self, spec: ModelSpec, max_trainable_params: float | None) -> UtilityModel:
        """The model to use with a budget of trainable parameters; by default, this one."""
        return self

    def needed(self, metric_weights: Mapping[str, float], *, proxies: bool = False) -> tuple[str, ...]:
        """The statistics that the model reads with these metric weights, with or without proxies."""
        return self.needs

    def table(
        self,
        spec: ModelSpec,
        statistics: ModelStatistics,
        options: Sequence[Option],
        metric_weights: Mapping[str, float],
    ) -> UtilityTable:
        """The utility of every option.

        Args:
            metric_weights: ``profiling.metric_weights``, for models that read them.

        Raises:
            ProfilingError: a statistic that the model needs is missing.
        """
        lacking = [need for need in self.needs if not has_statistic(statistics, need)]
        if lacking:
            usable = [
                other.name
                for other in UTILITY_MODELS.values()
                if all(has_statistic(statistics, need) for need in other.needed(metric_weights))
            ]
            raise ProfilingError(
                f"profiling.utility_model: {self.name!r} needs the statistic {lacking[0]!r}, which these statistics "
                f"lack; run `layerlens run` with utility_model: {self.name}, or choose {', '.join(usable)}"
            )
        return UtilityTable(tuple(options), self.function(spec, statistics, options), self.name, self.unit)

    def calibrated(
        self,
        spec: ModelSpec,
        statistics: ModelStatistics,
        options: Sequence[Option],
        metric_weights: Mapping[str, float],
        *,
        seed: int = 0,
    ) -> UtilityTable:
        """``table`` as predicted loss drops, by the proxies of ``statistics``; as it is where there are none.

        Raises:
            ProfilingError: the statistics lack what the model needs.
        """
        study = statistics.proxies
        if study is None:
            return self.table(spec, statistics, options, metric_weights)
        trained = [one.option for one in study.gains]  # maybe of ranks that are no longer on offer
        together = tuple(dict.fromkeys((*options, *trained)))
        return calibrate(self.table(spec, statistics, together, metric_weights), study, seed=seed).first(len(options))


def has_statistic(statistics: ModelStatistics, name: str) -> bool:
    """Whether any layer has the statistic ``name``."""
    found = [measured for layer in statistics.layers for measured in layer.by_method.values()]
    values = [measured.value(field) for measured in found for field in STATISTICS[name].fields[:1]]
    return any(value is not None and np.size(value) > 0 for value in values)


def model_for(name: str, spec: ModelSpec, max_trainable_params: float | None) -> str:
    """Name of the model that ``name`` means for a budget of trainable parameters."""
    used: UtilityModel = UTILITY_MODELS[name].for_budget(spec, max_trainable_params)
    return used.name


def needed_statistics(name: str, metric_weights: Mapping[str, float], *, proxies: bool = False) -> tuple[str, ...]:
    """The statistics that the utility model ``name`` reads; those of "weighted" follow from its weights.

    >>> needed_statistics("weighted", {"fisher": 1.0})
    ('fisher',)
    """
    needed: tuple[str, ...] = UTILITY_MODELS[name].needed(metric_weights, proxies=proxies)
    return needed


def utility_table(
    name: str,
    spec: ModelSpec,
    statistics: ModelStatistics,
    options: Sequence[Option],
    metric_weights: Mapping[str, float],
) -> UtilityTable:
    """The utility of every option by the model ``name``; see ``UtilityModel.table``."""
    table: UtilityTable = UTILITY_MODELS[name].table(spec, statistics, options, metric_weights)
    return table


def calibrated_table(
    name: str,
    spec: ModelSpec,
    statistics: ModelStatistics,
    options: Sequence[Option],
    metric_weights: Mapping[str, float],
    *,
    seed: int = 0,
) -> UtilityTable:
    """The same as predicted loss drops where proxies were trained; see ``UtilityModel.calibrated``."""
    table: UtilityTable = UTILITY_MODELS[name].calibrated(spec, statistics, options, metric_weights, seed=seed)
    return table
