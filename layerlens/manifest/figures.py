"""Figures of the report as inline SVG: the same data give the same bytes, and the page's colours apply.

Text stays text (it can be read aloud, searched, and takes the page's font). Colours are CSS variables, so a figure
follows dark mode and print. Ids get a prefix, because several figures share one page. What only a calibrated report has
is drawn by matplotlib, in placeholders for the colours (``figure_style``, ``inline_svg``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from layerlens.manifest.plot import Plot
from layerlens.models import LORA, SolverEvent
from layerlens.registry import METHODS

# Drawn colour -> CSS variable of the page.
INK, FAINT = "#010101", "#020202"

DASHES = ("", "8 3", "2 2", "8 3 2 3")
"""Of the lines of several trainings, in turn."""

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
    bottom = min(0.0, *(value for curve in curves for value in (*curve.utility, *curve.low)))
    plot = Plot(
        3.6, 2.3, above=0.1, x_label="trainable parameters", y_label="utility", x_format=_compact, y_format=_compact,
        x_limits=(0.0, None), y_limits=(bottom, top),
    )  # fmt: skip
    for curve in curves:
        if curve.low:
            plot.band(curve.params, curve.low, curve.high, _variable(curve.method), 0.18)
        plot.line(curve.params, curve.utility, _variable(curve.method), mark=METHODS[curve.method].marker)
    for curve in curves:
        for params, utility, rank in zip(curve.params, curve.utility, curve.ranks, strict=True):
            if chosen == (curve.method, rank):
                plot.point(params, utility, _variable("ink"), 6.0, ring=True)
    return _finished(plot, title=title, description=description, prefix=prefix)


def solver_progress(events: Sequence[SolverEvent], *, title: str, prefix: str) -> str:
    """The proved bound and the best value over time, as steps.

    Args:
        events: in the order of time.
        title: what a screen reader says; the page has the figures as a table beside it.
        prefix: makes the figure's ids unique on the page.
    """
    found = [event for event in events if event.value is not None]
    plot = Plot(
        8.4, 2.0, above=0.3, x_label="time (ms)", y_label="score", x_format=_plain, y_format=_compact, x_ticks=8
    )
    lines = (
        (events, "upper_bound", "ink", "proved bound", "v"),
        (found, "value", LORA, "best found", "o"),
    )
    for points, field, colour, label, mark in lines:
        times = [1e3 * event.seconds for event in points]
        values = [getattr(event, field) for event in points]
        plot.line(times, values, _variable(colour), mark=mark, steps=True, label=label)
    return _finished(plot, title=title, description="The table below has the figures.", prefix=prefix)


def training_losses(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, title: str, description: str, prefix: str
) -> str:
    """Loss over the steps of one or several trainings.

    Args:
        curves: name, steps and losses; the first one is the choice.
        title, description: what a screen reader says.
        prefix: makes the figure's ids unique on the page.
    """
    plot = Plot(
        8.4, 2.4, above=0.3, x_label="optimiser step", y_label="training loss", x_format=_plain,
        y_format=lambda value: f"{value:.4g}", x_ticks=8,
    )  # fmt: skip
    for place, (name, steps, losses) in enumerate(curves):
        colour, dashes = _variable("ink" if place else LORA), DASHES[place % len(DASHES)]
        plot.line(steps, losses, colour, dashes=dashes, width=1.6, label=name)
    return _finished(plot, title=title, description=description, prefix=prefix)


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
    plot = Plot(
        3.6, 2.3, above=0.1, x_label=axis, y_label="score", x_format=_compact, y_format=_compact,
        x_limits=(base - 0.04 * room, base + FRONTIER_ROOM * room), y_limits=(min(0.0, min(scores)), None),
    )  # fmt: skip
    plot.band(budgets, [0.0] * len(scores), scores, _variable(LORA), 0.1)
    plot.line(budgets, scores, _variable(LORA))
    if budget is not None:
        plot.upright(budget, _variable("ink"))
    plot.point(total, score, _variable("ink"), 3.25)
    return _finished(plot, title=title, description=description, prefix=prefix)


def _finished(plot: Plot, *, title: str, description: str, prefix: str) -> str:
    return plot.svg(ink=_variable("ink"), rule=_variable("rule"), title=title, description=description, prefix=prefix)


def _variable(name: str) -> str:
    """A colour of the page: of a method, or "ink" or "rule"."""
    return f"var(--{name})"


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


def _plain(value: float) -> str:
    return f"{value:g}"
