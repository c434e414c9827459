"""The report's curves: utility over parameters with its uncertainty, and how proxies calibrated it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from layerlens.manifest.figures import FAINT, INK, Curve, figure_style, inline_svg, method_colour, utility_curves
from layerlens.manifest.formats import method_name, number
from layerlens.models import (
    RESOURCES,
    Calibration,
    CostTable,
    Manifest,
    MethodStatistics,
    ModelStatistics,
    Prediction,
    UtilityTable,
)
from layerlens.registry import METHODS

STRONGEST = 6
"""Layers whose utility curves are shown."""

ENERGY_POWER = {"tempered": 0.25, "tempered_energy": 0.25, "signal": 0.5, "gradient": 0.5}
"""Utility model -> the power of the gradient energy in it."""

BANDS = {
    "proxies": "Bands contain 95 % of the curves fitted to resampled proxies.",
    "noise": (
        "Bands reach from the utility of the gradient energy without sampling noise (lower edge) to that of the "
        "measured energy (upper edge)."
    ),
    "": (
        "Their uncertainty was not measured. profiling.proxies gives 95 % bands from short real training; "
        "profiling.statistics: [fisher] gives the share of sampling noise."
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


def calibration_section(manifest: Manifest, found: Calibration | None) -> dict[str, Any]:
    """The values of the report's section; empty where nothing was calibrated."""
    if found is None:
        return {}
    study = found.study
    low, high = manifest.predicted.gain_interval or (0.0, 0.0)
    facts = [
        ("Spearman, theory against gain", ranking(found.overall)),
        (
            "Predicted loss drop of the choice",
            f"{number(manifest.predicted.gain or 0.0)} ({number(low)} to {number(high)})",
        ),
        ("Options trained", f"{len(study.gains)} of {study.planned}, {study.steps} steps each"),
        ("Held-out samples", f"{study.held_out_samples}, loss {number(study.base_loss)} before"),
        ("Error of a left-out option", f"{number(found.leave_one_out_rmse)} (root mean square)"),
    ]
    rows = [
        {
            "layer": one.option.layer,
            "method": one.option.method,
            "rank": one.option.rank,
            "theory": number(theory),
            "fitted": number(fitted),
            "measured": f"{number(one.gain)} ± {number(one.standard_error)}",
        }
        for one, theory, fitted in zip(study.gains, found.theoretical, found.fitted, strict=True)
    ]
    methods = [(method, ranking(each)) for method, each in found.by_method.items()]
    svg = _figure(found)
    return {"facts": facts, "rows": rows, "methods": methods, "svg": Markup(svg)}


def ranking(found: Prediction) -> str:
    """A rank correlation with its interval, as text."""
    if found.spearman is None:
        return "– (too few, or all alike)"
    interval = "" if found.interval is None else f" ({found.interval[0]:.2f} to {found.interval[1]:.2f})"
    return f"{found.spearman:.2f}{interval}"


def _figure(found: Calibration) -> str:
    """Measured gain over theoretical utility, with one standard error and the fitted curve, a panel for each method."""
    from matplotlib.figure import Figure

    of = {
        method: [index for index, one in enumerate(found.study.gains) if one.option.method == method]
        for method in found.by_method
    }
    with figure_style():
        figure = Figure(figsize=(2.9 * len(of), 2.3), layout="constrained")
        panels = figure.subplots(1, len(of), squeeze=False)[0]
        for axes, (method, indices) in zip(panels, of.items(), strict=True):
            theory = [found.theoretical[index] for index in indices]
            gains = [found.study.gains[index] for index in indices]
            axes.axhline(0.0, color=FAINT, linewidth=0.8)
            axes.errorbar(
                theory, [one.gain for one in gains], yerr=[one.standard_error for one in gains],
                fmt="o", markersize=4.5, color=method_colour(method), elinewidth=1.0,
            )  # fmt: skip
            knots = found.curves[method]
            axes.plot([knot[0] for knot in knots], [knot[1] for knot in knots], color=INK, linewidth=1.2)
            axes.set_xlabel("utility by theory")
            axes.set_ylabel("measured loss drop")
            axes.set_title(METHODS[method].label, fontsize=10, color=INK)
            axes.locator_params(nbins=4)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline_svg(
        buffer.getvalue(), title="Measured gain of the trained options over their predicted utility",
        description="The table below has the figures.", prefix="calibration",
    )  # fmt: skip
