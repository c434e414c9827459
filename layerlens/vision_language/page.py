"""report.html of the pipeline: timings by step, and every image with its boxes and its report. One file, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from layerlens.vision_language.figures import COLOURS, REST, step_bars, token_times
from layerlens.vision_language.results import STEPS, Item

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
        "uri": _data_uri(picture) if picture is not None else None,
        "detections": outcome.detections if outcome else None,
    }


def _data_uri(path: Path) -> str:
    with Image.open(path) as image:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
