"""report.html of the pipeline: timings by step, and every image with its boxes and its report. One file, no script.

The plots are inline SVG whose text and lines follow the page's colours.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from layerlens.vision_language.claims import sentences_of
from layerlens.vision_language.results import STEPS, Item, Outcome

SHOWN_IMAGES, LARGEST_SIDE = 40, 640


def report_page(items: Sequence[Item], summary: Mapping[str, Any], pictures: Mapping[Path, Path]) -> str:
    """The page.

    Args:
        items: all images.
        summary: see ``pipeline.vision_language``.
        pictures: image -> its annotated file.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["ms"] = milliseconds
    variants = summary["variants"]
    return environment.get_template("pipeline.html.j2").render(
        summary=summary,
        variants=variants,
        step_names={**STEPS, "unattributed": "unattributed"},
        colours={**COLOURS, "unattributed": REST},
        rows=[_rows(variant) for variant in variants],
        bars=Markup(_bars(variants)) if any(_means(variant, "steady") for variant in variants) else None,
        tokens=_tokens(items, variants),
        images=[_image(item, summary["primary"], pictures) for item in items[:SHOWN_IMAGES]],
        left_out=max(0, len(items) - SHOWN_IMAGES),
    )


def milliseconds(value: float | None) -> str:
    """Three significant digits, no exponent."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.1e}"


def _means(variant: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Mean of every step over the passes that asked the language model and those that did not, so that they add up."""
    timings = variant[kind]
    passes = timings["passes"]
    if not passes:
        return {}
    means = {step: figures["mean"] * figures["n"] / passes for step, figures in timings["steps_ms"].items()}
    return {**means, "unattributed": timings["unattributed_ms"]["mean"]}


def _bars(variants: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for variant in variants:
        for kind, words in (("warmup", "warm-up"), ("steady", "measured")):
            means = _means(variant, kind)
            if means:
                rows.append((f"{variant['variant']}, {words}", means))
    spoken = "; ".join(f"{label}: {milliseconds(sum(means.values()))} ms" for label, means in rows)
    return step_bars(rows, title="Mean time of every step for one image", description=spoken, prefix="steps")


def _rows(variant: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    timings = variant["steady"]
    rows = list(timings["steps_ms"].items())
    if timings["unattributed_ms"]:
        rows.append(("unattributed", timings["unattributed_ms"]))
    return rows


def _tokens(items: Sequence[Item], variants: Sequence[Mapping[str, Any]]) -> Markup | None:
    series = []
    for variant in variants:
        outcomes = [outcome for item in items for outcome in item.outcomes.get(variant["variant"], [])]
        answers = [outcome.run.token_ms for outcome in outcomes if outcome.run.token_ms and not outcome.run.warmup]
        if answers:
            series.append((variant["variant"], answers))
    return Markup(token_times(series, title="Time of every token", prefix="tokens")) if series else None


def _image(item: Item, primary: str, pictures: Mapping[Path, Path]) -> dict[str, Any]:
    outcome = item.latest(primary)
    picture = pictures.get(item.path)
    return {
        "name": item.path.name,
        "outcome": outcome,
        "report": _marked(outcome) if outcome else None,
        "uri": _data_uri(picture) if picture is not None else None,
        "detections": outcome.detections if outcome else None,
    }


def _marked(outcome: Outcome) -> Markup | None:
    """The report with its wrong sentences marked."""
    if not outcome.report:
        return None
    wrong = {one["number"] for one in (outcome.check or {}).get("sentences", ())}
    parts, place = [], 0
    for number, sentence in enumerate(sentences_of(outcome.report), 1):
        start = outcome.report.index(sentence, place)
        parts.append(escape(outcome.report[place:start]))
        parts.append(f"<mark>{escape(sentence)}</mark>" if number in wrong else escape(sentence))
        place = start + len(sentence)
    return Markup("".join([*parts, escape(outcome.report[place:])]))


def _data_uri(path: Path) -> str:
    with Image.open(path) as image:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


INK, FAINT = "#010101", "#020202"
REST = "#9aa3ad"
LEGEND_COLUMNS = 4
# One colour for each step; the detector's are blue and green, the language model's warm.
COLOURS = dict(
    zip(
        STEPS,
        ("#8ecae6", "#4f9fd0", "#1f6fb2", "#0b4a82", "#7a7a7a", "#c9a227", "#ffe08a", "#e9c46a", "#f4a261", "#e76f51",
         "#b5362c", "#7f1d1d", "#000000", "#2a9d8f"),
        strict=True,
    )
)  # fmt: skip
_SETTINGS: Any = {
    "svg.hashsalt": "layerlens", "svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "text.color": INK,
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": FAINT, "grid.linewidth": 0.6,
}  # fmt: skip


def step_bars(rows: Sequence[tuple[str, Mapping[str, float]]], *, title: str, description: str, prefix: str) -> str:
    """One stacked bar for each row, from steps ("unattributed" included) and their milliseconds.

    Args:
        rows: (label, step -> ms), drawn from top to bottom.
        title, description: what a screen reader says.
        prefix: makes the figure's ids unique on the page.
    """
    shown = [*STEPS, "unattributed"]
    with _style():
        from matplotlib.figure import Figure

        drawn = sum(any(values.get(step, 0.0) > 0.0 for _, values in rows) for step in shown)
        keys = -(-drawn // LEGEND_COLUMNS)
        figure = Figure(figsize=(8.6, 1.0 + 0.42 * len(rows) + 0.24 * keys), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(rows))
        for step in shown:
            widths = np.array([max(0.0, values.get(step, 0.0)) for _, values in rows])
            if widths.any():
                axes.barh(
                    [label for label, _ in rows], widths, left=left, height=0.62, color=COLOURS.get(step, REST),
                    label=STEPS.get(step, step),
                )  # fmt: skip
                left += widths
        figure.legend(loc="outside lower left", ncols=LEGEND_COLUMNS, frameon=False, handlelength=1.0)
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        axes.set_xlim(left=0)
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        _bare(axes)
        return _svg(figure, title, description, prefix)


def token_times(series: Sequence[tuple[str, Sequence[Sequence[float]]]], *, title: str, prefix: str) -> str:
    """Time of every token by its place in the answer: the median over answers, a line for each series.

    Args:
        series: (label, for each answer the milliseconds between tokens).
        title: what a screen reader says; the page's table has the figures.
        prefix: makes the figure's ids unique on the page.
    """
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.6, 2.4), layout="constrained")
        axes = figure.subplots()
        for (label, answers), colour in zip(series, ("#e76f51", "#1f6fb2", "#2a9d8f"), strict=False):
            longest = max(map(len, answers))
            places = [[answer[place] for answer in answers if len(answer) > place] for place in range(longest)]
            axes.plot(
                range(2, longest + 2), [float(np.median(times)) for times in places], color=colour, linewidth=1.6,
                label=label,
            )  # fmt: skip
        axes.set_xlabel("token of the answer")
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        axes.grid(True)
        if len(series) > 1:
            axes.legend(frameon=False)
        _bare(axes)
        return _svg(figure, title, "The table has the figures.", prefix)


def _style() -> Any:
    from contextlib import ExitStack

    from matplotlib import rc_context, rcdefaults, rcParams

    stack = ExitStack()
    stack.enter_context(rc_context())
    rcdefaults()
    rcParams.update(_SETTINGS)
    return stack


def _bare(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(figure: Any, title: str, description: str, prefix: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", body)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1, flags=re.DOTALL)
    body = body.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)")
    opening = f'<svg role="img" aria-labelledby="{prefix}-title {prefix}-desc"'
    names = f'<title id="{prefix}-title">{escape(title)}</title><desc id="{prefix}-desc">{escape(description)}</desc>'
    return body.replace("<svg", opening, 1).replace(">", f">{names}", 1).strip()
