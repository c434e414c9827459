"""More and less budget: a traced frontier as CSV and SVG, and the report's section on every limited resource."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from layerlens.manifest.figures import FRONTIER_ROOM, budget_frontier
from layerlens.manifest.formats import RESOURCE_NAMES, UNITS, in_sentence, percent, quantity, resource_name
from layerlens.models import FrontierRow, Manifest, ResourceUse
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text

TIMES = ((0.5, "half"), (1.0, "as it is"), (2.0, "double"), (4.0, "four times"))
MOST_POINTS = 300
"""Points of a hull that are drawn: about one for each pixel of the figure."""


def frontier_section(manifest: Manifest, hulls: Mapping[str, Sequence[FrontierRow]]) -> list[dict[str, Any]]:
    """A figure, and the same as figures in words, for every resource with a budget and a hull; [] where nothing scores.

    Args:
        manifest: the choice.
        hulls: resource -> its exact concave hull, other budgets left aside.
    """
    entries = []
    for use in manifest.resources:
        hull = hulls.get(use.resource, ())
        room = 0.0 if use.budget is None else use.budget - use.base
        if len(hull) < 2 or room <= 0.0 or manifest.score <= 0.0:
            continue
        entries.append(_entry(manifest, use, hull, room))
    return entries


def _entry(manifest: Manifest, use: ResourceUse, hull: Sequence[FrontierRow], room: float) -> dict[str, Any]:
    assert use.budget is not None
    budgets, scores = np.array([row.budget for row in hull]), np.array([row.score for row in hull])
    name = resource_name(use.resource)
    steps = []
    for factor, words in TIMES:
        allowed = use.base + factor * room
        score = float(np.interp(allowed, budgets, scores)) if allowed >= budgets[0] else None
        steps.append(
            {
                "budget": quantity(use.resource, allowed),
                "words": words,
                "share": "nothing fits" if score is None else percent(score / manifest.score, digits=0),
            }
        )
    told = "; ".join(f"{step['budget']} ({step['words']}): at most {step['share']}" for step in steps)
    x, y = _drawn(budgets, scores, use.base + FRONTIER_ROOM * room)
    unit = UNITS.get(use.resource, "")
    svg = budget_frontier(
        x, y, budget=use.budget, base=use.base, total=use.total, score=manifest.score,
        axis=in_sentence(name) + (f" ({unit})" if unit in ("GB", "ms") else ""),
        title=f"Best score over the {in_sentence(name)}; the chosen point uses {quantity(use.resource, use.total)}",
        description=f"In percent of the chosen score, if this were the only budget: {told}.",
        prefix=f"frontier-{use.resource}",
    )  # fmt: skip
    return {"name": name, "steps": steps, "svg": Markup(svg)}


def _drawn(budgets: np.ndarray, scores: np.ndarray, end: float) -> tuple[list[float], list[float]]:
    """The hull up to ``end``, thinned to what a figure can show; beyond its last point nothing more is gained."""
    inside = budgets < end
    x, y = budgets[inside], scores[inside]
    last = float(np.interp(end, budgets, scores))
    if len(x) > MOST_POINTS:
        kept = np.unique(np.searchsorted(x, np.linspace(x[0], x[-1], MOST_POINTS)))
        x, y = x[kept], y[kept]
    return [*x.tolist(), end], [*y.tolist(), last]


def write_frontier(
    directory: Path, resource: str, hull: Sequence[FrontierRow], certified: Sequence[FrontierRow]
) -> dict[str, Path]:
    """Write ``frontier.csv`` and ``frontier.svg``; equal inputs give equal bytes.

    Returns:
        their paths, under "frontier_csv" and "frontier_svg".
    """
    return {
        "frontier_csv": atomic_write_text(directory / "frontier.csv", _as_csv([*hull, *certified])),
        "frontier_svg": atomic_write_bytes(directory / "frontier.svg", _as_svg(resource, hull, certified)),
    }


def _as_csv(rows: Sequence[FrontierRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(FrontierRow)])
    writer.writerows(dataclasses.astuple(row) for row in rows)
    return text.getvalue()


def _as_svg(resource: str, hull: Sequence[FrontierRow], certified: Sequence[FrontierRow]) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "layerlens", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            [row.budget for row in hull],
            [row.score for row in hull],
            color="#7a8793",
            label="exact hull, other budgets aside",
        )
        axes.errorbar(
            [row.budget for row in certified],
            [row.score for row in certified],
            yerr=[[0.0] * len(certified), [row.upper_bound - row.score for row in certified]],
            fmt="o",
            color="#0b6bbf",
            capsize=3,
            label="certified allocation within all budgets, bar to its bound",
        )
        unit = "" if resource == "trainable_params" else f" ({UNITS[resource]})"
        axes.set_xlabel(f"budget: {RESOURCE_NAMES[resource].lower()}{unit}")
        axes.set_ylabel("score")
        if resource in ("trainable_params", "flops") and hull[-1].budget > 0:
            axes.set_xscale("symlog", linthresh=max(hull[min(1, len(hull) - 1)].budget, 1.0))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
