"""report.html: what was chosen, what it uses of each budget, how good it provably is, and what checking it showed.

One file that needs nothing else and asks for nothing. Its script sorts and folds; the page is whole without it. This
module turns manifest and tables into the values that the template shows; the template (templates/report.html.j2) only
places them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from layerlens.manifest.curves import calibration_section, curves_section, methods_shown
from layerlens.manifest.figures import solver_progress
from layerlens.manifest.formats import (
    RESOURCE_NAMES,
    in_sentence,
    method_name,
    number,
    percent,
    quantity,
    resource_name,
    signed_percent,
)
from layerlens.manifest.frontier import frontier_section
from layerlens.manifest.frozen import why_no_deeper
from layerlens.manifest.layers import COLUMNS, heat_map, layer_groups
from layerlens.manifest.page import rendered, report_script, script_hash
from layerlens.manifest.summary import (
    budget_facts,
    counts,
    expert_lines,
    left_out_lines,
    proof,
    proved_by,
    score_in_words,
    share_of_model,
    worth,
)
from layerlens.models import (
    NONE,
    RESOURCES,
    CostTable,
    FrontierRow,
    FrozenStage,
    LayerExplanation,
    Manifest,
    ModelStatistics,
    Predicted,
    ResourceUse,
    SolverEvent,
    UtilityTable,
)
from layerlens.models.data_summary import DataSummary
from layerlens.models.recipe import Recipe
from layerlens.registry import METHODS
from layerlens.utils.atomic import atomic_write_text

PROXY_CHECKS = {
    "loss_drop": "loss drop of the choice in a proxy's steps",
    "uniform_loss_drop": "the same for equal ranks on all layers",
    "loss_drop_over_uniform": "loss drop of the choice minus that of equal ranks",
}

MARKED_ERROR = 0.2
"""Relative errors above this are marked and explained."""
WHY_OFF = {
    "trainable_params": "the model has parameters that its layers do not show; please report this.",
    "flops": "a module computes more than its shape shows, so a FLOPs budget holds only about this well.",
    "vram_gb": "the allocator rounds and caches memory, and libraries use workspaces; leave this much room in a memory "
    "budget.",
    "latency_ms": "the profile describes an idle machine; this one may have been busy, or its clock lower. Run again "
    "when it is idle, or set the figures of your device in optimization.latency_profile.",
    "step_ms": "the time of a step depends on other work on the machine, and on kernels that the profile does not "
    "cover. Run again when the machine is idle.",
}
"""Resource -> why its prediction may be far off, and what to do."""


def write_report(
    path: Path,
    *,
    manifest: Manifest,
    utilities: UtilityTable,
    costs: CostTable,
    statistics: ModelStatistics,
    measured: dict[str, Any],
    explanations: Sequence[LayerExplanation] = (),
    frozen: Sequence[FrozenStage] = (),
    events: Sequence[SolverEvent] = (),
    hulls: Mapping[str, Sequence[FrontierRow]] | None = None,
    data: DataSummary | None = None,
    created_at: str = "",
    recipes: Sequence[Recipe] = (),
    recipes_from: str = "",
    fewer_recipes: str = "",
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
        frozen: stages below the lowest adapted layer, the nearest first.
        events: the solver's log.
        hulls: resource -> the exact hull of score over its budget, other budgets left aside.
        data: what was read; None where the choice was made from saved statistics.
        created_at: when the choice was written, as the manifest has it.
        recipes: code that uses the choice.
        recipes_from: where paths in it start from.
        fewer_recipes: why there is none for some programs.

    Raises:
        OutputError: the file cannot be written.
    """
    curves, written = curves_section(manifest, utilities, costs, statistics), manifest.fields()
    about = _about(manifest, data, created_at)
    page = rendered(
        "report.html.j2",
        model=manifest.model.name_or_path or "an unnamed model",
        title=" · ".join((manifest.model.name_or_path or "a model", *(fact for fact in about))),
        about=about,
        script=Markup(report_script()),
        script_hash=script_hash(report_script()),
        recipes=recipes,
        recipes_from=recipes_from,
        fewer=fewer_recipes,
        beside=_beside_uniform(manifest),
        summary=_summary(manifest) | {"no_deeper": why_no_deeper(manifest, frozen)},
        budgets=[budget_facts(use) for use in manifest.resources],
        heat=heat_map(manifest.allocations),
        certificate=_certificate(manifest),
        calibration=calibration_section(manifest, utilities.calibration),
        checks=_checks(measured),
        frontiers=frontier_section(manifest, hulls or {}),
        curves=curves,
        curve_methods=methods_shown(curves["figures"], METHODS.names()),
        utility_unit=utilities.unit,
        layers=layer_groups(manifest, statistics, explanations),
        layer_columns=[name for name in COLUMNS if explanations or name != "Runner-up"],
        left_out=[*expert_lines(manifest), *left_out_lines(manifest)],
        explained=bool(explanations),
        solver=_solver(events),
        measured_on=_measured_on(statistics),
        data=_data(data),
        provenance=list(_flat({"model": written["model"], "lora": written["lora"], **written["provenance"]})),
        methods=METHODS.values(),
        method_names={name: method_name(name) for name in (NONE, *METHODS)},
    )
    atomic_write_text(Path(path), page)


def _summary(manifest: Manifest) -> dict[str, Any]:
    found = counts(manifest.allocations)
    return {
        "layers": len(manifest.allocations),
        "adapted": sum(found.values()),
        "counts": [(method_name(method), count) for method, count in found.items()],
        "parameters": number(manifest.trainable_params),
        "share": share_of_model(manifest),
        "tightest": _tightest(manifest.resources),
        "gain": _gain(manifest.predicted),
        "worth": worth(manifest),
        "words": score_in_words(manifest),
    }


def _about(manifest: Manifest, data: DataSummary | None, created_at: str) -> list[str]:
    """What the title says beside the model: task, data, date, version."""
    found = manifest.provenance.statistics or {}
    source = (data.source if data else "") or found.get("source") or ""
    samples = found.get("calibration_samples")
    facts = [manifest.model.task or "", str(source) and f"data: {source}", samples and f"{number(samples)} samples"]
    version = (manifest.provenance.versions or {}).get("layerlens")
    facts += [created_at[:16].replace("T", " ") and f"{created_at[:16].replace('T', ' ')} UTC"]
    facts += [version and f"LayerLens {version}"]
    return [fact for fact in facts if fact]


def _beside_uniform(manifest: Manifest) -> list[dict[str, str]]:
    """The costs of the choice and of uniform LoRA with as many parameters; none where no step was recorded."""
    other, rows = manifest.predicted.uniform_lora or {}, []
    for use in manifest.resources:
        if use.resource in other:
            uniform = other[use.resource]
            rows.append(
                {
                    "name": resource_name(use.resource),
                    "own": quantity(use.resource, use.total),
                    "uniform": quantity(use.resource, uniform),
                    "difference": signed_percent(use.total / uniform - 1.0) if uniform else "–",
                }
            )
    return rows


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


def _certificate(manifest: Manifest) -> dict[str, str]:
    return {
        "score": f"{manifest.score:.7g}",  # enough digits to tell it from the bound
        "bound": f"{manifest.upper_bound:.7g}",
        "gap": percent(manifest.gap, digits=4),
        "status": manifest.status,
        "counted": proved_by(manifest),
        "cheapest": proof(manifest) if manifest.predicted.cheapest is not None else "",
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
                    "marked": abs(value["relative_error"]) > MARKED_ERROR,
                    "width": round(50 * min(abs(value["relative_error"]), 1.0), 1),  # half of the bar is 100 %
                }
            )
        elif name == "step_zero_max_abs_delta":
            single.append(("largest change of any logit before the first step", number(value)))
        else:
            single.append((label, number(value) if isinstance(value, int | float) else str(value)))
    marked = {name.removeprefix("base_") for name, value in measured.items() if _is_marked(value)}
    why = [f"{resource_name(name)}: {WHY_OFF[name]}" for name in WHY_OFF if name in marked]
    return {"compared": compared, "single": single, "why": why}


def _is_marked(value: Any) -> bool:
    return isinstance(value, Mapping) and abs(value.get("relative_error") or 0.0) > MARKED_ERROR


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


def _data(data: DataSummary | None) -> dict[str, Any]:
    """What was read, line by line, and one sample; empty where nothing was."""
    if data is None:
        return {}
    return {"facts": data.facts(), "shown": list(data.shown.items())}


def _flat(values: Any, place: str = "") -> Any:
    """(dotted path, text) of every value in nested dictionaries."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list | tuple):
        yield place, ", ".join(map(str, values))
    else:
        yield place, "–" if values is None else str(values)
