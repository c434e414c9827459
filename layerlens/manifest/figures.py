"""Figures of the report as inline SVG: the same data give the same bytes, and the page's colours apply.

Text stays text (it can be read aloud, searched, and takes the page's font). Colours are drawn as placeholders and
become CSS variables, so a figure follows dark mode and print. Ids get a prefix, because several figures share one page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from layerlens.models import LORA, SolverEvent
from layerlens.registry import METHODS

# Drawn colour -> CSS variable of the page.
INK, FAINT = "#010101", "#020202"

# Points on the edge of the axes are shown whole.
_LINE: Any = {"markersize": 4.5, "linewidth": 1.8, "clip_on": False}
_RING: Any = {"markersize": 12, "fillstyle": "none", "markeredgewidth": 1.6, "clip_on": False}

FRONTIER_ROOM = 4.2
"""The frontier is drawn up to this many times the room that the budget leaves above the frozen model."""

_SETTINGS: Any = {
    "svg.hashsalt": "layerlens",  # ids from the content instead of a random salt
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
}


def method_colour(method: str) -> str:
    """What a method is drawn in: a placeholder for its colour on the page."""
    return "#" + 3 * f"{METHODS.names().index(method) + 3:02x}"


@contextmanager
def figure_style() -> Iterator[None]:
    """matplotlib with the report's settings alone, whatever style the user or a notebook has set."""
    from matplotlib import rc_context, rcdefaults, rcParams

    with rc_context():
        rcdefaults()
        rcParams.update(_SETTINGS)
        yield


def framed(width: float, height: float, *, above: float = 0.1) -> tuple[Any, Any]:
    """A figure of one axes, inches; room for labels is given, since measuring it takes longer than the drawing.

    Args:
        width, height: of the figure.
        above: what is left free above the axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.8 / width, 0.5 / height, (width - 0.95) / width, (height - 0.5 - above) / height))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))  # never wider than the room
    return figure, axes


@dataclass(frozen=True)
class Curve:
    """Utility of the options of one method on one layer.

    Args:
        method: its name.
        params: trainable parameters of each option, ascending.
        utility: utility of each option.
        ranks: rank of each option.
        low, high: how far the utility of each option may be off, if it is known; else empty.
    """

    method: str
    params: tuple[int, ...]
    utility: tuple[float, ...]
    ranks: tuple[int, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def utility_curves(
    curves: Sequence[Curve], chosen: tuple[str, int] | None, *, top: float, title: str, description: str, prefix: str
) -> str:
    """One layer's utility over trainable parameters: a line and its band for each method, the chosen option ringed.

    Args:
        curves: a line each.
        chosen: (method, rank) of the option that the manifest takes, None when it leaves the layer alone.
        top: upper end of the utility axis, the same for figures that are to be compared.
        title, description: what a screen reader says.
        prefix: makes the figure's ids unique on the page.
    """
    with figure_style():
        figure, axes = framed(3.6, 2.3)
        for curve in curves:
            colour, marker = method_colour(curve.method), METHODS[curve.method].marker
            if curve.low:
                axes.fill_between(curve.params, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(curve.params, curve.utility, color=colour, marker=marker, **_LINE)
            for params, utility, rank in zip(curve.params, curve.utility, curve.ranks, strict=True):
                if chosen == (curve.method, rank):
                    axes.plot([params], [utility], "o", color=INK, **_RING)
        axes.xaxis.set_major_formatter(lambda value, _: _compact(value))
        axes.set_xlim(left=0)
        axes.set_ylim(min(0.0, *(value for curve in curves for value in (*curve.utility, *curve.low))), top)
        axes.locator_params(nbins=5)
        axes.set_xlabel("trainable parameters")
        axes.set_ylabel("utility")
        svg = _finished(figure, axes)
    return inline_svg(svg, title=title, description=description, prefix=prefix)


def solver_progress(events: Sequence[SolverEvent], *, title: str, prefix: str) -> str:
    """The proved bound and the best value over time, as steps.

    Args:
        events: in the order of time.
        title: what a screen reader says; the page has the figures as a table beside it.
        prefix: makes the figure's ids unique on the page.
    """
    found = [event for event in events if event.value is not None]
    with figure_style():
        figure, axes = framed(8.4, 2.0, above=0.3)
        lines = (
            (events, "upper_bound", INK, "proved bound", "v"),
            (found, "value", method_colour(LORA), "best found", "o"),
        )
        for points, field, colour, label, marker in lines:
            axes.step(
                [1e3 * event.seconds for event in points],
                [getattr(event, field) for event in points],
                where="post", color=colour, label=label, marker=marker, **_LINE,
            )  # fmt: skip
        axes.set_xlabel("time (ms)")
        axes.set_ylabel("score")
        axes.grid(True)
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline_svg(buffer.getvalue(), title=title, description="The table below has the figures.", prefix=prefix)


def training_losses(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, title: str, description: str, prefix: str
) -> str:
    """Loss over the steps of one or several trainings.

    Args:
        curves: name, steps and losses; the first one is the choice.
        title, description: what a screen reader says.
        prefix: makes the figure's ids unique on the page.
    """
    styles: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
    with figure_style():
        figure, axes = framed(8.4, 2.4, above=0.3)
        for place, (name, steps, losses) in enumerate(curves):
            colour = INK if place else method_colour(LORA)
            axes.plot(steps, losses, color=colour, label=name, linestyle=styles[place % len(styles)], linewidth=1.6)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("training loss")
        axes.locator_params(nbins=6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
        svg = _finished(figure, axes)
    return inline_svg(svg, title=title, description=description, prefix=prefix)


def budget_frontier(
    budgets: Sequence[float], scores: Sequence[float], *, budget: float | None, base: float, room: float, total: float,
    score: float, axis: str, title: str, description: str, prefix: str,
) -> str:  # fmt: skip
    """Score over one budget: the hull, the budget as a line, and the choice.

    Args:
        budgets, scores: the hull.
        budget: what was allowed; None where that lies beyond the figure.
        base: what the frozen model needs of it.
        room: how much of it above that is shown, but for a factor.
        total, score: the choice.
        axis: name and unit of the resource.
        title, description: what a screen reader says.
        prefix: makes the figure's ids unique on the page.
    """
    with figure_style():
        figure, axes = framed(3.6, 2.3)
        axes.fill_between(budgets, scores, color=method_colour(LORA), alpha=0.10, linewidth=0)
        axes.plot(budgets, scores, color=method_colour(LORA), linewidth=1.8)
        if budget is not None:
            axes.axvline(budget, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.plot([total], [score], "o", color=INK, markersize=6.5, clip_on=False)
        axes.xaxis.set_major_formatter(lambda value, _: _compact(value))
        axes.set_xlim(base - 0.04 * room, base + FRONTIER_ROOM * room)
        axes.set_ylim(bottom=min(0.0, min(scores)))
        axes.locator_params(nbins=5)
        axes.set_xlabel(axis)
        axes.set_ylabel("score")
        svg = _finished(figure, axes)
    return inline_svg(svg, title=title, description=description, prefix=prefix)


def _finished(figure: Any, axes: Any) -> str:
    """The figure's SVG, with a grid behind the curves and open at the top and right."""
    axes.grid(True)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline_svg(svg: str, *, title: str, description: str, prefix: str) -> str:
    """matplotlib's SVG file as an accessible element inside a page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1, flags=re.DOTALL)
    for colour, variable in ((INK, "ink"), (FAINT, "rule"), *((method_colour(name), name) for name in METHODS)):
        body = body.replace(colour, f"var(--{variable})")
    names = (
        f'<title id="{prefix}-title">{escape(title)}</title>'
        f'<desc id="{prefix}-desc">{escape(description)}</desc>'
    )  # fmt: skip
    opening = f'<svg role="img" aria-labelledby="{prefix}-title {prefix}-desc"'
    return body.replace("<svg", opening, 1).replace(">", f">{names}", 1).strip()


def _compact(value: float) -> str:
    """1234 as "1.2k": ticks have little room."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
