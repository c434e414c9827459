"""What the report says about proxies: how well theory ranked measured gains, and the curves fitted through them."""

from __future__ import annotations

import io
from typing import Any

from markupsafe import Markup

from layerlens.manifest.figures import FAINT, INK, figure_style, inline_svg, method_colour
from layerlens.manifest.formats import number
from layerlens.models import Calibration, Manifest, Prediction
from layerlens.registry import METHODS


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
        buffer.getvalue(), title="Measured gain of the trained options over their theoretical utility",
        description="The table below has the figures.", prefix="calibration",
    )  # fmt: skip
