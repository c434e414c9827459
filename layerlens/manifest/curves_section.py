"""The utility curves of the report, with what is known of their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from layerlens.manifest.figures import Curve, utility_curves
from layerlens.manifest.formats import method_name, number
from layerlens.models import RESOURCES, CostTable, Manifest, MethodStatistics, ModelStatistics, UtilityTable

STRONGEST = 6
"""Layers whose utility curves are shown."""

ENERGY_POWER = {"tempered": 0.25, "tempered_energy": 0.25, "signal": 0.5, "gradient": 0.5}
"""Utility model -> the power of the gradient energy in it."""

BANDS = {
    "proxies": "Bands: where 95 % of the curves lie that were fitted to resampled proxies.",
    "noise": (
        "Bands: from the utility with all sampling noise taken off the gradient energy (lower edge) to that of the "
        "energy as it was measured (upper edge)."
    ),
    "": (
        "Their uncertainty was not measured: profiling.proxies gives 95 % bands by short real training, "
        "profiling.statistics: [fisher] the share of sampling noise."
    ),
}


def curves_section(
    manifest: Manifest, utilities: UtilityTable, costs: CostTable, statistics: ModelStatistics
) -> dict[str, Any]:
    """``figures`` for the layers with the largest utility of any option, and the ``note`` on what their bands are."""
    low, high, source = bands(utilities, statistics)
    params = costs.cost__ro[RESOURCES.index("trainable_params")]
    options: dict[str, dict[str, list[int]]] = {}
    for index, option in enumerate(utilities.options):
        if option.method != "none":
            options.setdefault(option.layer, {}).setdefault(option.method, []).append(index)
    best = {
        layer: max(float(utilities.utility[i]) for of in methods.values() for i in of)
        for layer, methods in options.items()
    }
    strongest = sorted(best, key=lambda layer: -best[layer])[:STRONGEST]
    shown = [index for layer in strongest for of in options[layer].values() for index in of]
    ends = [float(value[i]) for i in shown for value in (utilities.utility, high) if np.isfinite(value[i])]
    top = 1.05 * max(ends, default=0.0) or 1.0
    taken = {row.layer: (row.method, row.rank) for row in manifest.allocations if row.method != "none"}
    figures = []
    for position, layer in enumerate(strongest):
        curves = []
        for method, indices in options[layer].items():
            order = sorted(indices, key=lambda i: (int(params[i]), utilities.options[i].rank))
            known = bool(np.isfinite(low[order]).all())
            curves.append(
                Curve(
                    method,
                    tuple(int(params[i]) for i in order),
                    tuple(float(utilities.utility[i]) for i in order),
                    tuple(utilities.options[i].rank for i in order),
                    tuple(float(low[i]) for i in order) if known else (),
                    tuple(float(high[i]) for i in order) if known else (),
                )
            )
        method, rank = taken.get(layer, ("none", 0))
        chosen = f"{method_name(method)} {rank}" if rank else "none"
        svg = utility_curves(
            curves, taken.get(layer), top=top, title=f"Utility of the options of {layer}; chosen: {chosen}",
            description="; ".join(map(_in_words, curves)), prefix=f"curve{position}",
        )  # fmt: skip
        figures.append({"layer": layer, "chosen": chosen, "methods": list(options[layer]), "svg": Markup(svg)})
    return {"figures": figures, "note": BANDS[source]}


def bands(utilities: UtilityTable, statistics: ModelStatistics) -> tuple[np.ndarray, np.ndarray, str]:
    """Lower and upper ends of every option's utility, float64 [n_options], and what they rest on.

    "proxies": the 2.5th and 97.5th percentile of the calibration's replicates. "noise": a utility that is a power p of
    the gradient energy E, times what does not depend on the samples, is U·(signal/E)^p without the sampling noise and
    U with it (whichever of the two the model itself takes). "": nothing is known. Both are NaN where they are unknown.
    """
    utility = utilities.utility
    if utilities.calibration is not None:
        low, high = np.percentile(utilities.calibration.replicates__bo, [2.5, 97.5], axis=0)
        return low, high, "proxies"
    power = ENERGY_POWER.get(utilities.model)
    measured = statistics.by_name()
    if power is None or not any(_has_noise(each) for layer in statistics.layers for each in layer.by_method.values()):
        return np.full_like(utility, np.nan), np.full_like(utility, np.nan), ""
    low, high = np.full_like(utility, np.nan), np.full_like(utility, np.nan)
    for index, option in enumerate(utilities.options):
        found = measured[option.layer].by_method.get(option.method) if option.layer in measured else None
        if found is None or not _has_noise(found):
            continue
        assert found.energy is not None
        assert found.signal is not None
        ratio = (max(found.signal, 0.0) / found.energy) ** power
        if utilities.model not in ("tempered", "signal"):
            low[index], high[index] = utility[index] * ratio, utility[index]
        elif ratio > 0.0:  # else nothing of the utility is left that could be scaled up again
            low[index], high[index] = utility[index], utility[index] / ratio
    return low, high, "noise"


def _has_noise(found: MethodStatistics) -> bool:
    return bool(found.energy) and found.signal is not None


def _in_words(curve: Curve) -> str:
    """Every point of a curve, as a screen reader says it."""
    points = [f"rank {rank} {number(utility)}" for rank, utility in zip(curve.ranks, curve.utility, strict=True)]
    if curve.low:
        points = [
            f"{point} ({number(low)} to {number(high)})"
            for point, low, high in zip(points, curve.low, curve.high, strict=True)
        ]
    return f"{method_name(curve.method)}: {', '.join(points)}"


def methods_shown(figures: Sequence[dict[str, Any]], methods: Sequence[str]) -> list[str]:
    """Those of ``methods`` that any figure shows, for the legend."""
    return [method for method in methods if any(method in figure["methods"] for figure in figures)]
