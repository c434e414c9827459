"""The summary of a run in tables: what was chosen, its use of each budget, how predictions held, what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from layerlens.cli.next_steps import after_choice, show_next
from layerlens.cli.output import RESOURCE_NAMES, amount, gap, scaled, share, short, significant
from layerlens.manifest.frozen import why_no_deeper
from layerlens.manifest.grid import Grid, grid_of
from layerlens.manifest.layer_names import Position, positions
from layerlens.manifest.summary import (
    expert_lines,
    left_out_lines,
    peft_holds,
    proof,
    proved_by,
    score_in_words,
    worth,
)
from layerlens.models import LayerExplanation, Manifest, ManifestRow, Option, Predicted, ResourceUse
from layerlens.models.data_summary import DataSummary
from layerlens.registry import METHODS

if TYPE_CHECKING:
    from layerlens.pipeline import RunResult


FEW_LAYERS = 8
BAR_WIDTH = 10
TIE = 1e-12
"""Differences in score that are rounding."""
PROXY_CHECK = "proxy_check_"
"""Beginning of the check's entries in a result's `measured`."""
_UNCHANGED = "·"


def chosen(manifest: Manifest) -> RenderableType:
    """What was chosen: a row for each adapted layer when they are few, else blocks by roles."""
    adapted = [row for row in manifest.allocations if row.method != "none"]
    if not adapted:
        return Text("No layer is adapted: no option is worth its cost within the budgets.")
    grid = grid_of(manifest.allocations)
    if len(adapted) <= FEW_LAYERS or not grid.blocks:
        table: RenderableType = _one_row_each(adapted, len(manifest.allocations) - len(adapted))
    else:
        table = _blocks_by_roles(grid)
    told = peft_holds(manifest)
    return Group(table, _totals(adapted, len(manifest.allocations)), *([Text(told)] if told else []))


def budgets(resources: Sequence[ResourceUse]) -> RenderableType:
    """Use of every budget: what the frozen model needs, what the choice adds, and a bar of both."""
    table = new_table("Budgets")
    table.add_column("resource")  # the one that may wrap where the terminal is narrow
    for name in ("base", "added", "total", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("used", no_wrap=True)
    for use in resources:
        name, kind = RESOURCE_NAMES.get(use.resource, use.resource.replace("_", " ")), use.resource
        base = amount(kind, use.base) if use.base else "–"
        cells: list[RenderableType] = [Text(name), base, amount(kind, use.added), amount(kind, use.total)]
        if use.budget is None:
            table.add_row(*cells, Text("no limit", style="dim"), "")
        else:
            table.add_row(*cells, amount(kind, use.budget), _bar(use))
    return table


def certificate(manifest: Manifest) -> Text:
    """How good the choice provably is."""
    if manifest.predicted.cheapest is not None:
        text = Text(f"{proof(manifest)} Solver: {manifest.solver}.")
        if counted := proved_by(manifest):
            text.append(f" {counted}")
        return text.append(f" Utility model: {manifest.utility_model}, in {manifest.utility_unit}.")
    scores = f"its score is {manifest.score:.6g}, and no choice within the budgets exceeds {manifest.upper_bound:.6g}"
    if manifest.status == "optimal":
        proved, style = f"optimal (proved{f', gap {gap(manifest.gap)}' if manifest.gap else ''})", "bold green"
    else:
        proved, style = f"within {gap(manifest.gap)} of the optimum (proved)", "bold yellow"
    text = Text.assemble("This choice is ", (proved, style), f": {scores}. Solver: {manifest.solver}.")
    if counted := proved_by(manifest):
        text.append(f" {counted}")
    return text.append(f" Utility model: {manifest.utility_model}, in {manifest.utility_unit}.")


def calibration(predicted: Predicted) -> Text | None:
    """What the proxies showed; None where the utilities are not calibrated."""
    found = predicted.calibration
    if found is None or predicted.gain_interval is None:
        return None
    low, high = predicted.gain_interval
    steps = f"{found.proxies} options trained for {found.steps} steps"
    text = Text.assemble(
        "Predicted loss drop: ",
        (f"{predicted.gain:.4g}", "bold"),
        f" per sample (95 %: {low:.3g} to {high:.3g})",
    )
    if found.spearman is None:
        return text.append(f", from {steps}; their gains were too similar to say how well the utilities rank them.")
    interval = found.spearman_interval
    style = "" if interval is None else "green" if interval[0] > 0.0 else "yellow"
    span = "" if interval is None else f" (95 %: {interval[0]:.2f} to {interval[1]:.2f})"
    text.append(f", from {steps}, which the utilities ranked with a Spearman of ")
    return text.append(f"{found.spearman:.2f}{span}", style=style).append(".")


def measured(checks: Mapping[str, Any], when: str = "") -> RenderableType | None:
    """Predictions beside what was measured, ``when`` it was in an earlier run; None when nothing was measured."""
    table = new_table("Checked on the model", caption=f"from the cache, measured {when}" if when else None)
    table.add_column("", no_wrap=True)
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, check in checks.items():
        if isinstance(check, Mapping) and {"predicted", "measured", "relative_error"} <= check.keys():
            kind = name.removeprefix("base_")
            label = RESOURCE_NAMES.get(kind, name) + (" of the base model" if kind != name else "")
            predicted, found, error = (float(check[key]) for key in ("predicted", "measured", "relative_error"))
            # Latency depends on the machine; the others are arithmetic and should be close.
            style = "yellow" if abs(error) > 0.1 else ""
            spread = f" ± {significant(check['standard_error'])}" if "standard_error" in check else ""
            table.add_row(
                label, amount(kind, predicted), amount(kind, found) + spread, Text(f"{100 * error:+.1f} %", style=style)
            )
    over = checks.get("loss_drop_over_uniform")
    if over is not None:
        table.add_row(
            "difference of the two", "", f"{significant(over['measured'])} ± {significant(over['standard_error'])}", ""
        )
    for name, check in checks.items():
        if name.startswith(PROXY_CHECK):
            drop = f"{significant(check['measured'])} ± {significant(check['standard_error'])}"
            table.add_row(f"loss drop in the proxy check, {name.removeprefix(PROXY_CHECK)}", "", drop, "")
    change = checks.get("step_zero_max_abs_delta")
    if change is not None:
        style = "green" if change == 0 else "bold red"
        verdict = Text("exactly 0" if change == 0 else f"{change:.3g}", style=style)
        table.add_row("largest change of a logit at step 0", "0", verdict, "")
    return table if table.row_count else None


def _one_row_each(adapted: Sequence[ManifestRow], others: int) -> Table:
    caption = f"{others} other layers are unchanged." if others else None
    table = new_table("Chosen", caption=caption)
    table.add_column("layer", overflow="fold")
    table.add_column("method", no_wrap=True)
    for name in ("size", "parameters", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in adapted:
        method = Text(row.method, style=METHODS[row.method].style)
        table.add_row(Text(row.layer), method, str(row.rank), f"{row.cost:,}", significant(row.total_score))
    return table


def _blocks_by_roles(grid: Grid) -> Group:
    there = {row.method for blocks in grid.blocks for row in blocks.cells if row is not None}
    shown = [method for method in METHODS.values() if method.name in there]
    letters = "  ".join(f"{method.letter} {method.label} {method.unit}" for method in shown)
    table = new_table("Chosen", caption=f"{letters}  {_UNCHANGED} unchanged")
    table.add_column("block", justify="right", no_wrap=True)
    for role in grid.roles:
        table.add_column(Text(role.replace(".", ".\n")), justify="right", min_width=3)
    several = len(grid.stacks) > 1
    for blocks in grid.blocks:
        table.add_row(Text(f"{blocks.stack} {blocks.name}" if several else blocks.name), *map(_cell, blocks.cells))
    return Group(table, *([_one_row_each(grid.outside, 0)] if grid.outside else []))


def _cell(row: ManifestRow | None) -> Text:
    if row is None:
        return Text("")
    if row.method == "none":
        return Text(_UNCHANGED, style="dim")
    method = METHODS[row.method]
    return Text(f"{method.letter}{row.rank}", style=method.style)


def _totals(adapted: Sequence[ManifestRow], layers: int) -> Text:
    parts = []
    for method in METHODS:
        rows = [row for row in adapted if row.method == method]
        if rows:
            parts.append(f"{method} on {len(rows)} ({scaled(sum(row.cost for row in rows))} parameters)")
    return Text(f"{len(adapted)} of {layers} layers adapted: {', '.join(parts)}.")


def _bar(use: ResourceUse) -> Text:
    """Base, added and free part of a budget, and the share that is used."""
    assert use.budget is not None
    used, of_base = (part / use.budget if use.budget else float(part > 0) for part in (use.total, use.base))
    filled = round(BAR_WIDTH * min(max(used, 0.0), 1.0))
    base = min(filled, round(BAR_WIDTH * min(max(of_base, 0.0), 1.0)))
    style = "red" if used > 1 else "green"
    parts = (("▓" * base, "blue"), ("█" * (filled - base), style), ("░" * (BAR_WIDTH - filled), "dim"))
    return Text.assemble(*parts, f" {share(used):>5}")


def explanations(each: Sequence[LayerExplanation]) -> RenderableType:
    """Why each layer got what it got: the runner-up, and what would have to change for it to win."""
    table = new_table("Why", caption="at the shadow prices of the budgets; score and costs are those of the runner-up")
    table.add_column("layer")
    for name in ("chosen", "runner-up", "score short by"):
        table.add_column(name, no_wrap=True)
    table.add_column("or cheaper by")
    places = positions([name for one in each for name in one.layers])
    for one in each:
        names = Text(", ".join(_short_name(name, places[name]) for name in one.layers))
        if one.runner_up is None or one.value_to_flip is None:
            table.add_row(names, _option(one.chosen), "no other option", "", "")
        elif one.value_to_flip <= TIE:
            table.add_row(
                names, _option(one.chosen), _option(one.runner_up), "0" if one.fits else "0, but does not fit", ""
            )
        else:
            cheaper = (
                f"{amount(name, less)} {RESOURCE_NAMES.get(name, name)}" for name, less in one.cost_to_flip.items()
            )
            table.add_row(
                names, _option(one.chosen), _option(one.runner_up), significant(one.value_to_flip), " or ".join(cheaper)
            )
    return table


def _short_name(name: str, place: Position) -> str:
    return name if place.block is None else f"{place.block} {place.role}"


def _option(option: Option) -> str:
    return f"{option.method} {option.rank}" if option.rank else _UNCHANGED


def new_table(title: str, caption: str | None = None, *, show_header: bool = True) -> Table:
    """An empty table in the style of all tables."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        show_header=show_header,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


FILE_MEANINGS = {
    "manifest_json": "the choice, its costs and its proof",
    "manifest_yaml": "the same, for reading",
    "peft": "LoRA adapter directory for PEFT, Trainer, TRL ...",
    "modules": "adapters and prefixes, for layerlens.tuning",
    "report": "report, for a browser",
    "solver_log": "bound and best choice after every stage of the solver",
    "statistics": "measured statistics, for `layerlens optimize`",
    "head": "the fitted task head, for layerlens.tuning",
}


def data(summary: DataSummary, *, sample: bool = False) -> RenderableType:
    """What was read, a line for each thing, and with ``sample`` one sample as the model sees it."""
    table = new_table("Data", show_header=False)
    table.add_column("", style="dim")
    table.add_column("", overflow="fold")
    for name, value in [*summary.facts(), *(summary.shown.items() if sample else ())]:
        table.add_row(Text(name), Text(value))
    return table


def show(result: RunResult, console: Console, *, explain: bool = False, sample: bool = False) -> None:
    """Write the summary of a run for people."""
    manifest = result.manifest
    read = [data(result.data, sample=sample)] if result.data is not None else []
    left_out = [Text(line, style="dim") for line in (*expert_lines(manifest), *left_out_lines(manifest, most=1))]
    parts = [*read, chosen(manifest), *left_out, budgets(manifest.resources), certificate(manifest)]
    if sentence := score_in_words(manifest):
        parts.append(Text(sentence))
    if sentence := worth(manifest):
        parts.append(Text(sentence))
    told = calibration(manifest.predicted)
    if told is not None:
        parts.append(told)
    if explain:
        parts.append(explanations(result.explanations))
        if sentence := why_no_deeper(manifest, result.frozen):
            parts.append(Text(sentence))
    for part in (*parts, measured(result.measured, result.repeats)):
        if part is not None:
            console.print(part)
            console.print()
    paths = {name: short(path) for name, path in result.files.items()}
    width = max(len(path) for path in paths.values())
    for name in sorted(paths, key=_order):
        console.print(
            Text.assemble(f"  {paths[name]:{width}}  ", (FILE_MEANINGS.get(name, name), "dim")), soft_wrap=True
        )
    console.print()
    console.print(Text(_time(result), style="dim"), soft_wrap=True)
    show_next(console, after_choice(result))


def as_json(result: RunResult) -> dict[str, Any]:
    """The result of a run as JSON values."""
    manifest, written = result.manifest, result.manifest.fields()
    return {
        "directory": result.directory,
        "files": result.files,
        "allocations": written["allocations"],
        "resources": written["resources"],
        "score": manifest.score,
        "upper_bound": manifest.upper_bound,
        "gap": manifest.gap,
        "status": manifest.status,
        "solver": manifest.solver,
        "predicted": written["predicted"],
        "measured": result.measured,
        "explanations": [asdict(explanation) for explanation in result.explanations],
        "frozen_stages": [asdict(stage) for stage in result.frozen],
        "statistics_from_cache": result.statistics_from_cache,
        "repeats": result.repeats or None,
        "seconds": result.seconds,
        "warnings": list(result.warnings),
        "data": None if result.data is None else result.data.fields(),
    }


def _order(name: str) -> int:
    known = list(FILE_MEANINGS)
    return known.index(name) if name in known else len(known)


def _time(result: RunResult) -> str:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    cached = "; statistics from the cache" if result.statistics_from_cache and "profile" in result.seconds else ""
    if result.repeats:
        cached = (
            f"; all from the cache: the run of {result.repeats} had the same configuration, files and code, so its "
            "results are written again (--no-cache measures anew)"
        )
    return f"{sum(result.seconds.values()):.1f} s ({stages}){cached}"
