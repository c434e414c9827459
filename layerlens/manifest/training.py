"""The report's section on training: loss curves and metrics, with uniform LoRA beside the choice where it was run.

A report has two places for it, which are empty until something is trained (``training_page``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from layerlens.manifest.figures import training_losses
from layerlens.manifest.formats import number, quantity
from layerlens.manifest.page import rendered
from layerlens.registry import METHODS

MOST_POINTS = 300
"""Points of a curve; each is the mean of as many steps where there are more."""
CHOICE = "this choice"
_PLACES = {
    "link": re.compile("(<!-- training link: begin -->).*?(<!-- training link: end -->)", re.S),
    "section": re.compile("(<!-- training: begin -->).*?(<!-- training: end -->)", re.S),
}
Facts = Mapping[str, Any]
"""What metrics.json of a training says."""


def training_page(trained: Sequence[Facts], report: str | None, *, timed: bool = True) -> str:
    """The report with the section on training in it; a page of the section alone where there is no report.

    Args:
        trained: of each training of this choice, the choice's own first.
        report: report.html of the run; None, or of a version without a place for it: see above.
        timed: with what differs between two runs of one training on one machine: times and memory.
    """
    values = training_section(trained, timed=timed)
    if report is not None and all(place.search(report) for place in _PLACES.values()):
        section = rendered("training.html.j2", training=values)
        parts = {"link": '<li><a href="#training">Training</a></li>', "section": f"\n{section}"}
        for name, place in _PLACES.items():
            found = place.search(report)
            assert found is not None
            report = report[: found.start()] + found[1] + parts[name] + found[2] + report[found.end() :]
        return report
    model = (trained[0].get("model") or {}).get("name_or_path") or "an unnamed model"
    style = {"methods": METHODS.values(), "heat": {"methods": []}}
    return rendered("training_page.html.j2", training=values, model=model, **style)


def training_section(trained: Sequence[Facts], *, timed: bool = True) -> dict[str, Any]:
    """The values that the section shows."""
    names = [name_of(each) for each in trained]
    before = trained[0].get("before") or {}
    metrics = [
        {
            "name": metric.replace("_", " "),
            "before": _figure(before.get(metric)),
            "after": [_figure((each.get("after") or {}).get(metric)) for each in trained],
        }
        for metric in dict.fromkeys(name for each in trained for name in each.get("after") or {})
    ]
    curves = [(name, *_thinned(each["training"]["losses"])) for name, each in zip(names, trained, strict=True)]
    curves = [curve for curve in curves if curve[1]]
    said = "; ".join(f"{name}: from {number(losses[0])} to {number(losses[-1])}" for name, _, losses in curves)
    svg = (
        training_losses(curves, title="Training loss over the steps", description=said, prefix="training")
        if curves
        else ""
    )
    return {
        "names": names,
        "metrics": metrics,
        "svg": Markup(svg),
        "took": [*_took(trained), *(_times(trained) if timed else ())],
        "sentence": _sentence(said, trained),
        "note": _note(names),
    }


def name_of(facts: Facts) -> str:
    """What the section calls a training."""
    return str((facts.get("baseline") or {}).get("name") or CHOICE)


def _sentence(said: str, trained: Sequence[Facts]) -> Markup:
    samples = trained[0].get("samples") or {}
    count = number(samples.get("train", 0))
    held = samples.get("evaluation", 0)
    judged = f"evaluated on {number(held)} held-out samples" if held else "and none were held out for evaluation"
    return escape(f"Trained on {count} samples, {judged}. Training loss: {said or 'no step was taken'}.")


def _note(names: Sequence[str]) -> str:
    if len(names) > 1:
        return (
            "Each column is one training from one seed, so small differences may be chance; layerlens evaluate "
            "compares over several seeds with tuned learning rates."
        )
    return (
        "To see uniform LoRA with the same number of parameters here beside the choice, run: layerlens train "
        "manifest.json --baseline uniform-lora"
    )


def _took(trained: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    return [
        ("Optimiser steps", [_figure(_of(each, "training", "steps")) for each in trained]),
        ("Step of the kept weights", [_figure(_of(each, "training", "best_step")) for each in trained]),
        ("Trained parameters", [_figure(_of(each, "training", "trained_parameters")) for each in trained]),
    ]


def _times(trained: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    return [
        ("Wall time", [_seconds(_of(each, "measured", "wall_seconds")) for each in trained]),
        ("Tokens per second", [_figure(_of(each, "measured", "tokens_per_second")) for each in trained]),
        ("Peak memory", [_memory(_of(each, "measured", "peak_memory_gb")) for each in trained]),
    ]


def _of(facts: Facts, part: str, name: str) -> Any:
    return (facts.get(part) or {}).get(name)


def _thinned(losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """Steps and losses, at most ``MOST_POINTS`` of them."""
    if not losses:
        return [], []
    steps = np.arange(1, len(losses) + 1)
    parts = min(len(losses), MOST_POINTS)
    means = [float(np.mean(part)) for part in np.array_split(np.asarray(losses, dtype=np.float64), parts)]
    return [float(np.mean(part)) for part in np.array_split(steps, parts)], means


def _figure(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and math.isfinite(value) else "–"


def _seconds(value: Any) -> str:
    return f"{number(round(float(value), 1))} s" if isinstance(value, int | float) else "–"


def _memory(value: Any) -> str:
    return quantity("vram_gb", value) if isinstance(value, int | float) else "–"
