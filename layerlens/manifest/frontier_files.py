"""A traced frontier on disk: every point as CSV, and the curve as SVG."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from layerlens.manifest.formats import RESOURCE_NAMES, UNITS
from layerlens.models import FrontierRow
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text


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
