"""``frontier``: what more of one budget would buy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerlens.cli import output
from layerlens.cli.commands_run import do
from layerlens.cli.errors import guarded
from layerlens.cli.output import RESOURCE_NAMES, amount, gap
from layerlens.cli.places import Debug, Json, Output, Quiet, Set, budget_of
from layerlens.cli.saved import SavedConfig, SavedStatistics, saved_job

if TYPE_CHECKING:
    from layerlens.config import RunConfig
    from layerlens.pipeline import FrontierResult


@guarded("no result was written")
def frontier(
    statistics: SavedStatistics,
    config: SavedConfig = None,
    resource: Annotated[
        str, typer.Option("--resource", "-r", help="trainable_params, flops, vram_gb, latency_ms or step_ms.")
    ] = "trainable_params",
    at: Annotated[
        list[str] | None, typer.Option("--at", help="Certify a choice at this budget (20k, 8GB); repeatable.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Number of budgets to certify without --at.")] = 10,
    directory: Output = None,
    settings: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The same as optimize --frontier: what more of one budget would buy, exactly.

    Without a configuration file the curve goes beside the statistics.
    """
    statistics, checked, base_dir = saved_job(statistics, config, {}, settings, directory)
    trace(statistics, checked, base_dir, resource, at, points, json=json, quiet=quiet)


def trace(
    statistics: Path, checked: RunConfig, base_dir: Path, resource: str, at: list[str] | None, points: int, *,
    json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Trace the whole budget-to-score curve of one resource, exactly, and certify allocations along it."""
    from layerlens.pipeline import trace_frontier

    result = do(
        lambda progress, warn: trace_frontier(
            statistics,
            checked,
            resource,
            base_dir=base_dir,
            budgets=[budget_of(resource, text, "--at") for text in at or ()],
            points=points,
            progress=progress,
        ),
        quiet,
    )
    if json:
        from dataclasses import asdict

        output.json_result(asdict(result))
    elif not quiet:
        _show(result)


def _show(result: FrontierResult) -> None:
    from layerlens.cli.tables import new_table

    console = output.console()
    table = new_table(f"What {RESOURCE_NAMES[result.resource]} buy")
    for name in ("budget", "score", "share of the most", "gap", "status"):
        table.add_column(name, justify="right", no_wrap=True)
    most = max((row.score for row in (*result.hull, *result.certified)), default=0.0)
    for row in result.certified:
        share = f"{100 * row.score / most:.1f} %" if most > 0 else "–"
        table.add_row(amount(result.resource, row.budget), f"{row.score:.6g}", share, gap(row.gap), row.status)
    if len(result.hull) <= 1 and not result.certified:
        console.print("No option has a gain above its sampling noise, so no budget buys anything.")
    else:
        console.print(table)
    for row in result.marked:
        console.print(f"{row.layer}: {amount(result.resource, row.budget)}, score {row.score:.6g}.")
    if result.hull and result.hull[0].kind == "bound":
        console.print(f"A curve of {len(result.hull):,} points that no choice exceeds is in the files.")
    elif result.hull:
        console.print(f"The exact hull has {len(result.hull):,} {'points' if len(result.hull) > 1 else 'point'}.")
    for path in result.files.values():
        console.print(f"  {output.short(path)}", soft_wrap=True)
