"""More and less budget: a traced frontier as table, figure, CSV and SVG, and the report's section on every budget."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from layerlens.manifest.figures import FRONTIER_ROOM, budget_frontier
from layerlens.manifest.formats import (
    RESOURCE_NAMES,
    UNITS,
    in_sentence,
    number,
    percent,
    quantity,
    resource_name,
)
from layerlens.manifest.tables import html_table, text_table
from layerlens.models import FrontierRow, Manifest, ResourceUse
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text

TIMES = ((0.5, "half"), (1.0, "as it is"), (2.0, "double"), (4.0, "four times"))
MOST_POINTS = 300
"""Points of a hull that are drawn: about one for each pixel of the figure."""
FAR = 100.0
"""Budgets beyond so many times what there is to buy are not drawn."""
MOST = sys.float_info.max


@dataclass(frozen=True)
class TracedFrontier:
    """What more or less of one budget buys. ``str`` and a notebook show it as a table, ``plot`` as a curve.

    Args:
        resource: whose budget varies: trainable_params, flops, vram_gb or latency_ms.
        hull: the exact upper concave hull of score over budget, other budgets left aside; of memory and step time, a
            curve that no choice exceeds.
        rows: allocations at chosen budgets, all other budgets kept, each with its proved bound.
        chosen: (use of the resource, score) of the choice that this was traced around, if there is one.
        marked: what everybody would choose, for comparison: ``layer`` has the name. Whether other budgets are kept is
            left aside.
    """

    resource: str
    hull: tuple[FrontierRow, ...]
    rows: tuple[FrontierRow, ...]
    chosen: tuple[float, float] | None = None
    marked: tuple[FrontierRow, ...] = ()

    def __str__(self) -> str:
        return "\n".join((*self._heads(), "", text_table(*self._table(), "")) if self.rows else self._heads())

    def _repr_html_(self) -> str:
        heads = "".join(f"<p>{escape(line)}</p>" for line in self._heads())
        if not self.rows:
            return heads
        picture = base64.b64encode(_as_svg(self)).decode()
        shown = f'<img alt="Score over budget, as the table has it" src="data:image/svg+xml;base64,{picture}">'
        return heads + html_table(*self._table(), "") + shown

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "resource": self.resource,
            "hull": [dataclasses.asdict(row) for row in self.hull],
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "marked": [dataclasses.asdict(row) for row in self.marked],
            "chosen": None if self.chosen is None else dict(zip(("budget", "score"), self.chosen, strict=True)),
        }

    def plot(self, ax: Any = None) -> Any:
        """Draw hull, certified allocations with their bounds, and the choice.

        Args:
            ax: matplotlib Axes; those of a new figure when None.

        Returns:
            the Axes.
        """
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots(layout="constrained")
        if self.hull:
            x, y = [row.budget for row in self.hull], [row.score for row in self.hull]
            exact = self.hull[0].kind == "hull"
            said = "exact hull, without the other budgets" if exact else "no choice scores more (proved)"
            ax.plot(x, y, color="#7a8793", label=said)
        end = FAR * max((row.budget for row in self.hull), default=MOST / FAR)
        drawn = [row for row in self.rows if row.budget <= end]
        beyond = f" ({len(self.rows) - len(drawn)} beyond the figure)" if len(drawn) < len(self.rows) else ""
        ax.errorbar(
            [row.budget for row in drawn],
            [row.score for row in drawn],
            yerr=[[0.0] * len(drawn), [row.upper_bound - row.score for row in drawn]],
            fmt="o",
            color="#0b6bbf",
            capsize=3,
            label=f"certified allocation within all budgets, bar to its bound{beyond}",
        )
        for row, marker in zip(self.marked, "s^vPX", strict=False):
            ax.plot([row.budget], [row.score], marker, color="#57606a", label=row.layer, zorder=3)
        if self.chosen is not None:
            ax.plot(*([value] for value in self.chosen), "D", color="#c2410c", label="the plan", zorder=3)
        unit = "" if self.resource == "trainable_params" else f" ({UNITS[self.resource]})"
        ax.set_xlabel(f"budget: {RESOURCE_NAMES[self.resource].lower()}{unit}")
        ax.set_ylabel("score")
        if self.resource in ("trainable_params", "flops") and self.hull and self.hull[-1].budget > 0:
            ax.set_xscale("symlog", linthresh=max(self.hull[min(1, len(self.hull) - 1)].budget, 1.0))
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
        return ax

    def _heads(self) -> list[str]:
        name = in_sentence(resource_name(self.resource))
        if not self.rows:
            return [f"No option has a gain above its sampling noise, so no budget of {name} buys anything."]
        said = [f"Best score for each budget of {name}, within all other budgets; every score is proved up to its gap."]
        if self.chosen is not None:
            used, score = self.chosen
            said.append(f"The plan uses {quantity(self.resource, used)} and has the score {number(score)}.")
        for row in self.marked:
            said.append(f"{row.layer}: {quantity(self.resource, row.budget)}, score {number(row.score)}.")
        return said

    def _table(self) -> tuple[list[str], list[list[str]]]:
        most = max((row.score for row in (*self.hull, *self.rows)), default=0.0)
        rows = [
            [
                quantity(self.resource, row.budget),
                number(row.score),
                percent(row.score / most) if most > 0 else "–",
                percent(row.gap, digits=4),
                row.status,
            ]
            for row in self.rows
        ]
        return ["budget", "score", "of the most", "gap", "status"], rows


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
        allowed = min(use.base + factor * room, MOST)
        score = float(np.interp(allowed, budgets, scores)) if allowed >= budgets[0] else None
        steps.append(
            {
                "budget": quantity(use.resource, allowed),
                "words": words,
                "share": "nothing fits" if score is None else percent(score / manifest.score, digits=0),
            }
        )
    told = "; ".join(f"{step['budget']} ({step['words']}): at most {step['share']}" for step in steps)
    # A budget far beyond everything there is to buy would leave the curve on one pixel.
    reach = min(room, FAR * (float(budgets[-1]) - use.base))
    if reach < room:
        told += "; the budget lies beyond the figure"
    x, y = _drawn(budgets, scores, use.base + FRONTIER_ROOM * reach)
    unit = UNITS.get(use.resource, "")
    svg = budget_frontier(
        x, y, budget=use.budget if reach == room else None, base=use.base, room=reach, total=use.total,
        score=manifest.score,
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


def write_frontier(directory: Path, traced: TracedFrontier) -> dict[str, Path]:
    """Write ``frontier.csv`` and ``frontier.svg``; equal inputs give equal bytes.

    Returns:
        their paths, under "frontier_csv" and "frontier_svg".
    """
    return {
        "frontier_csv": atomic_write_text(
            directory / "frontier.csv", _as_csv([*traced.hull, *traced.rows, *traced.marked])
        ),
        "frontier_svg": atomic_write_bytes(directory / "frontier.svg", _as_svg(traced)),
    }


def _as_csv(rows: Sequence[FrontierRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(FrontierRow)])
    writer.writerows(dataclasses.astuple(row) for row in rows)
    return text.getvalue()


def _as_svg(traced: TracedFrontier) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "layerlens", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        traced.plot(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
