"""What the report says of more and of less budget: the frontier of every limited resource, with the chosen point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from layerlens.manifest.figures import FRONTIER_ROOM, budget_frontier
from layerlens.manifest.formats import UNITS, in_sentence, percent, quantity, resource_name
from layerlens.models import FrontierRow, Manifest, ResourceUse

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
