"""The origin's utility: a weighted, normalised combination of scalar metrics for each layer, spread over ranks.

score_l = Σ_m w_m · x_{m,l} / max_l |x_{m,l}|, with weights scaled to sum 1 (``kernels.aggregate_scores``);
utility(l, rank) = score_l · √(rank / largest rank).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerlens import kernels
from layerlens.exceptions import ActivationCacheError
from layerlens.models import LORA, ModelSpec, ModelStatistics, Option, UtilityTable
from layerlens.utility.model import UtilityModel
from layerlens.utility.signal import SIGNAL, uniform

UNIT = "weighted metric score, at most 1"
CACHE_KEYS = {"gradient_energy": "grad_norm", "fisher": "fisher_trace", "proxy_eval": "proxy_gain"}
"""Metric -> the key that holds it in an activation cache (grad_norm is squared to give the gradient energy)."""

STATISTIC_OF = {"gradient_energy": "gradient", "fisher": "fisher"}
"""Metric of ``metric_weights`` -> the statistic that it is."""

logger = logging.getLogger("layerlens")


def metrics_of(statistics: ModelStatistics) -> dict[str, dict[str, float]]:
    """layer -> metric -> value, from measured statistics: of the LoRA matrix where there is one."""
    metrics = {}
    for layer in statistics.layers:
        measured = layer.by_method.get(LORA) or next(iter(layer.by_method.values()))
        values = {"gradient_energy": measured.energy, "fisher": measured.trace}
        metrics[layer.layer] = {metric: value for metric, value in values.items() if value is not None}
    return metrics


def metrics_from_cache(cache: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """layer -> metric -> value, from an activation cache of scalars, whose keys ``CACHE_KEYS`` lists."""
    metrics: dict[str, dict[str, float]] = {}
    for layer, scalars in cache.items():
        metrics[layer] = {metric: float(scalars[key]) for metric, key in CACHE_KEYS.items() if key in scalars}
        if "gradient_energy" in metrics[layer]:
            metrics[layer]["gradient_energy"] **= 2
    return metrics


def weighted_table(
    spec: ModelSpec,
    metrics: Mapping[str, Mapping[str, float]],
    options: Sequence[Option],
    metric_weights: Mapping[str, float],
) -> UtilityTable:
    """The weighted utility of every option.

    A metric that no layer has is left out, with a warning, and the other weights are scaled up.

    Raises:
        ActivationCacheError: a metric is there for some layers only, or no weighted metric is there at all.
    """
    names = [layer.name for layer in spec.layers]
    used: dict[str, float] = {}
    for metric, weight in sorted(metric_weights.items()):
        having = [name for name in names if metric in metrics.get(name, {})]
        if weight == 0.0:
            continue
        if not having:
            logger.warning(
                "metric %s has weight %g but no layer has it; the other weights are scaled up", metric, weight
            )
            continue
        if len(having) < len(names):
            missing = next(name for name in names if name not in having)
            raise ActivationCacheError(
                f"{missing}: no value for {metric} ({CACHE_KEYS[metric]!r}), but {len(having)} other layers have one; "
                "give it for every layer or for none"
            )
        used[metric] = weight
    if not used:
        wanted = ", ".join(CACHE_KEYS[metric] for metric, weight in sorted(metric_weights.items()) if weight > 0.0)
        raise ActivationCacheError(f"no layer has any of the weighted metrics; give {wanted} in the activation cache")
    values = {metric: [metrics[name][metric] for name in names] for metric in used}
    by_name = dict(zip(names, kernels.aggregate_scores(values, used, names), strict=True))
    largest_rank = max((option.rank for option in options), default=1) or 1
    utility = np.array([by_name[option.layer] * np.sqrt(option.rank / largest_rank) for option in options])
    return UtilityTable(tuple(options), utility, "weighted", UNIT)


@dataclass(frozen=True)
class Weighted(UtilityModel):
    """The model whose statistics follow from ``profiling.metric_weights``.

    With proxies the metric proxy_eval is there too: measured gains, carried to all layers along the signal.
    """

    def needed(self, metric_weights: Mapping[str, float], *, proxies: bool = False) -> tuple[str, ...]:
        wanted = {metric for metric, weight in metric_weights.items() if weight > 0.0}
        needed = {STATISTIC_OF[metric] for metric in wanted & set(STATISTIC_OF)}
        return tuple(sorted(needed | set(SIGNAL.needs if proxies and "proxy_eval" in wanted else ())))

    def table(
        self,
        spec: ModelSpec,
        statistics: ModelStatistics,
        options: Sequence[Option],
        metric_weights: Mapping[str, float],
    ) -> UtilityTable:
        metrics = metrics_of(statistics)
        if statistics.proxies and metric_weights.get("proxy_eval"):
            for layer, gain in _proxy_gains(spec, statistics, options).items():
                metrics[layer]["proxy_eval"] = gain
        return weighted_table(spec, metrics, options, metric_weights)


def _proxy_gains(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> dict[str, float]:
    """Loss drop of each layer's best option: the proxies' gains, carried to all layers along the signal."""
    table = SIGNAL.calibrated(spec, statistics, options, {})
    best = {layer.name: 0.0 for layer in spec.layers}
    for option, gain in zip(table.options, table.utility, strict=True):
        best[option.layer] = max(best[option.layer], float(gain))
    return best


MODEL = Weighted("weighted", uniform, UNIT)
