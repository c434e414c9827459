"""report.html: what was chosen, what it uses of each budget, how good it provably is, and what checking it showed.

One file that needs nothing else: no script, no request. This module turns manifest and tables into the values that the
template shows; the template (templates/report.html.j2) only places them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from layerlens.integrations.transformers import role_of
from layerlens.manifest.calibration import calibration_section
from layerlens.manifest.curves_section import curves_section, methods_shown
from layerlens.manifest.figures import solver_progress
from layerlens.manifest.formats import (
    RESOURCE_NAMES,
    UNITS,
    in_sentence,
    method_name,
    number,
    percent,
    quantity,
    resource_name,
    signed_percent,
)
from layerlens.manifest.frontier_section import frontier_section
from layerlens.models import (
    NONE,
    RESOURCES,
    CostTable,
    FrontierRow,
    LayerExplanation,
    Manifest,
    ManifestRow,
    ModelStatistics,
    Predicted,
    ResourceUse,
    SolverEvent,
    UtilityTable,
)
from layerlens.registry import METHODS
from layerlens.utils.atomic import atomic_write_text

PROXY_CHECKS = {
    "loss_drop": "loss drop of the choice in a proxy's steps",
    "uniform_loss_drop": "the same with all layers alike",
    "loss_drop_over_uniform": "loss drop of the choice over that with all layers alike",
}


def write_report(
    path: Path,
    *,
    manifest: Manifest,
    utilities: UtilityTable,
    costs: CostTable,
    statistics: ModelStatistics,
    measured: dict[str, Any],
    explanations: Sequence[LayerExplanation] = (),
    events: Sequence[SolverEvent] = (),
    hulls: Mapping[str, Sequence[FrontierRow]] | None = None,
) -> None:
    """Write the report to ``path``, atomically; the same arguments give the same bytes.

    Args:
        path: where, usually report.html.
        manifest: what was chosen.
        utilities, costs: what the solver chose from, for the curves.
        statistics: what was measured, for the noise of each layer.
        measured: quantity -> {"predicted", "measured", "relative_error"}, or one number; empty when nothing was
            checked.
        explanations: for each layer, or group of layers that choose alike, the runner-up and what would make it win.
        events: the solver's log.
        hulls: resource -> the exact hull of score over its budget, other budgets left aside.

    Raises:
        OutputError: the file cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    curves, written = curves_section(manifest, utilities, costs, statistics), manifest.fields()
    page = environment.get_template("report.html.j2").render(
        model=manifest.model.name_or_path or "",
        summary=_summary(manifest),
        budgets=[_budget(use) for use in manifest.resources],
        heat=heat_map(manifest.allocations),
        certificate=_certificate(manifest),
        calibration=calibration_section(manifest, utilities.calibration),
        checks=_checks(measured),
        frontiers=frontier_section(manifest, hulls or {}),
        curves=curves,
        curve_methods=methods_shown(curves["figures"], METHODS.names()),
        utility_unit=utilities.unit,
        layers=_layers(manifest, statistics, explanations),
        explained=bool(explanations),
        solver=_solver(events),
        measured_on=_measured_on(statistics),
        provenance=list(_flat({"model": written["model"], "lora": written["lora"], **written["provenance"]})),
        methods=METHODS.values(),
        method_names={name: method_name(name) for name in (NONE, *METHODS)},
    )
    atomic_write_text(Path(path), page)


def _summary(manifest: Manifest) -> dict[str, Any]:
    counts = {method: sum(row.method == method for row in manifest.allocations) for method in METHODS}
    return {
        "layers": len(manifest.allocations),
        "adapted": sum(counts.values()),
        "counts": [(method_name(method), count) for method, count in counts.items() if count],
        "parameters": number(manifest.trainable_params),
        "share": _share_of_model(manifest),
        "tightest": _tightest(manifest.resources),
        "gain": _gain(manifest.predicted),
    }


def _tightest(resources: Sequence[ResourceUse]) -> dict[str, str]:
    """The budget of which the largest share is used; empty without budgets."""
    shares = {use.resource: use.total / use.budget for use in resources if use.budget is not None and use.budget > 0}
    if not shares:
        return {}
    name = max(shares, key=lambda resource: shares[resource])
    return {"name": in_sentence(resource_name(name)), "used": percent(shares[name])}


def _gain(predicted: Predicted) -> dict[str, str]:
    """The predicted loss drop and its interval; empty where the utilities are not calibrated."""
    if not predicted.calibrated or predicted.gain is None or predicted.gain_interval is None:
        return {}
    low, high = predicted.gain_interval
    return {"value": number(predicted.gain), "interval": f"{number(low)} to {number(high)}"}


def _share_of_model(manifest: Manifest) -> str:
    total = manifest.model.total_params
    return percent(manifest.trainable_params / total, digits=2) if total else ""


def _budget(use: ResourceUse) -> dict[str, Any]:
    """Widths of the bar's parts in percent of the budget, and every figure as text."""
    text = {key: quantity(use.resource, getattr(use, key)) for key in ("base", "added", "total")}
    entry: dict[str, Any] = {
        **text,
        "name": resource_name(use.resource),
        "source": use.source,
        "limited": False,
    }
    entry["price"] = f"{number(use.multiplier)} score per {UNITS.get(use.resource, 'unit')}" if use.multiplier else ""
    if use.budget is not None and use.budget > 0:
        free = use.budget - use.total
        entry |= {
            "limited": True,
            "budget": quantity(use.resource, use.budget),
            "free": quantity(use.resource, max(free, 0.0)),
            "used": percent(use.total / use.budget),
            "base_width": round(100 * min(use.base / use.budget, 1.0), 3),
            "added_width": round(100 * min(use.added / use.budget, 1.0), 3),
            "has_base": use.base > 0,
        }
    return entry


@dataclass(frozen=True)
class Place:
    """Where a layer stands in the model: its block (a row of the heat map) and its role in it (a column)."""

    block: str
    role: str


def place_of(layer: str) -> Place:
    """The first number in a module path is the block; what follows it is the role.

    >>> place_of("bert.encoder.layer.3.attention.self.query")
    Place(block='3', role='query')
    >>> place_of("bert.pooler.dense")
    Place(block='', role='bert.pooler.dense')
    """
    found = re.fullmatch(r"(?:.*?\.)?(\d+)(?:\.(.+))?", layer)
    if not found:
        return Place("", layer)
    inner = (found[2] or "block").removesuffix(".self")  # BERT's attention.self
    return Place(found[1], role_of(inner).replace("_", " ") or inner)


def heat_map(rows: Sequence[ManifestRow]) -> dict[str, Any]:
    """The allocation as a table: a row for each block, a column for each role, in the model's order.

    A cell has the methods and ranks of its layers and the strength of its colour: the rank as a share of the largest
    rank of its method.
    """
    largest = {method: max((row.rank for row in rows if row.method == method), default=0) for method in METHODS}
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    blocks = dict.fromkeys(place_of(row.layer).block for row in rows)
    roles: dict[str, None] = {}  # in order of appearance
    for row in rows:
        place = place_of(row.layer)
        roles[place.role] = None
        strength = row.rank / largest[row.method] if row.rank else 0.0
        entry = {"method": row.method, "rank": row.rank, "layer": row.layer, "strength": round(15 + 40 * strength)}
        cells.setdefault((place.block, place.role), []).append(entry)
    return {
        "roles": list(roles),
        "blocks": [{"name": block, "cells": [cells.get((block, role), []) for role in roles]} for block in blocks],
        "methods": [method for method in METHODS if largest[method]],
    }


def _certificate(manifest: Manifest) -> dict[str, str]:
    return {
        "score": f"{manifest.score:.7g}",  # enough digits to tell it from the bound
        "bound": f"{manifest.upper_bound:.7g}",
        "gap": percent(manifest.gap, digits=4),
        "status": manifest.status,
        "solver": manifest.solver,
        "utility_model": manifest.utility_model,
        "utility_unit": manifest.utility_unit,
    }


def _checks(measured: Mapping[str, Any]) -> dict[str, Any]:
    compared, single = [], []
    for name, value in measured.items():
        resource = name.removeprefix("base_") if name.removeprefix("base_") in RESOURCES else ""
        label = RESOURCE_NAMES.get(resource) or PROXY_CHECKS.get(name) or name.replace("_", " ")
        if resource and resource != name:
            label += " of the frozen model"
        error = (
            f" ± {number(value['standard_error'])}" if isinstance(value, Mapping) and "standard_error" in value else ""
        )
        if isinstance(value, Mapping) and "predicted" not in value:
            single.append((label, number(value["measured"]) + error))
        elif isinstance(value, Mapping):
            compared.append(
                {
                    "name": label,
                    "predicted": quantity(resource, value["predicted"]),
                    "measured": quantity(resource, value["measured"]) + error,
                    "error": signed_percent(value["relative_error"]),
                    "side": "over" if value["relative_error"] > 0 else "under",
                    "width": round(50 * min(abs(value["relative_error"]), 1.0), 1),  # half of the bar is 100 %
                }
            )
        elif name == "step_zero_max_abs_delta":
            single.append(("largest change of any logit before the first step", number(value)))
        else:
            single.append((label, number(value) if isinstance(value, int | float) else str(value)))
    return {"compared": compared, "single": single}


def _layers(
    manifest: Manifest, statistics: ModelStatistics, explanations: Sequence[LayerExplanation]
) -> list[dict[str, Any]]:
    by_name = statistics.by_name()
    runners_up = {name: _runner_up(each) for each in explanations for name in each.layers}
    rows = []
    for row in manifest.allocations:
        found = by_name.get(row.layer)
        of = found.by_method if found else {}
        measured = of.get(row.method) or next(iter(of.values()), None)
        noise = None
        if measured and measured.energy and measured.signal is not None:
            noise = 1.0 - max(measured.signal, 0.0) / measured.energy
        rows.append(
            {
                "layer": row.layer,
                "method": row.method,
                "name": method_name(row.method),
                "rank": row.rank,
                "utility": number(row.utility),
                "params": number(row.cost),
                "flops": quantity("flops", row.flops),
                "vram": quantity("vram_gb", row.vram),
                "latency": quantity("latency_ms", row.latency),
                "score": number(row.total_score),
                "noise": "–" if noise is None else percent(noise),
                "runner_up": runners_up.get(row.layer, "–"),
            }
        )
    return rows


def _runner_up(explanation: LayerExplanation) -> str:
    """The second choice of a layer, and how much more score it would need at the shadow prices."""
    other = explanation.runner_up
    if other is None or explanation.value_to_flip is None:
        return "no other option"
    name = f"{method_name(other.method)} {other.rank}" if other.rank else "none"
    if explanation.value_to_flip <= 0:
        return f"{name}, which scores as high but does not fit beside the other choices"
    return f"{name}, short of {number(explanation.value_to_flip)}"


def _solver(events: Sequence[SolverEvent]) -> dict[str, Any]:
    """The solver's log as a figure and as rows; empty without events."""
    if not events:
        return {}
    rows = [
        {
            "time": f"{1e3 * event.seconds:.3g} ms",
            "stage": event.stage,
            "value": "–" if event.value is None else f"{event.value:.7g}",
            "bound": f"{event.upper_bound:.7g}",
        }
        for event in events
    ]
    svg = solver_progress(events, title="Proved bound and best allocation over time", prefix="solver")
    return {"rows": rows, "svg": Markup(svg)}


def _measured_on(statistics: ModelStatistics) -> list[tuple[str, str]]:
    return [
        ("calibration samples", number(statistics.n_samples)),
        ("tokens", number(statistics.n_tokens)),
        ("mean loss of the frozen model", number(statistics.mean_loss)),
    ]


def _breakable(name: str) -> Markup:
    """A module path that may break after its dots, which is where a reader expects it."""
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def _flat(values: Any, place: str = "") -> Any:
    """(dotted path, text) of every value in nested dictionaries."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list | tuple):
        yield place, ", ".join(map(str, values))
    else:
        yield place, "–" if values is None else str(values)
