"""``frontier``: what more of one budget would buy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from layerlens.cli import output
from layerlens.cli.commands_run import do, load
from layerlens.cli.errors import guarded
from layerlens.cli.output import RESOURCE_NAMES, amount, gap
from layerlens.cli.parameters import ConfigOption, Debug, Json, Output, Quiet, Set, Statistics
from layerlens.cli.places import base_dir_of
from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from layerlens.config import RunConfig
    from layerlens.pipeline import FrontierResult, RunResult


@guarded("no result was written")
def frontier(
    statistics: Statistics,
    config: ConfigOption,
    resource: Annotated[
        str, typer.Option("--resource", "-r", help="trainable_params, flops, vram_gb or latency_ms.")
    ] = "trainable_params",
    at: Annotated[
        list[float] | None, typer.Option("--at", help="Certify an allocation at this budget; repeatable.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="How many budgets to certify where none are given.")] = 10,
    directory: Output = None,
    settings: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Trace the whole budget-to-score curve of one resource, exactly, and certify allocations along it."""
    checked = load(config, settings, directory)
    from layerlens.pipeline import trace_frontier

    result = do(
        lambda progress, warn: trace_frontier(
            statistics,
            checked,
            resource,
            base_dir=base_dir_of(config),
            budgets=at or (),
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
    most = result.hull[-1].score
    for row in result.certified:
        share = f"{100 * row.score / most:.1f} %" if most > 0 else "–"
        table.add_row(amount(result.resource, row.budget), f"{row.score:.6g}", share, gap(row.gap), row.status)
    if len(result.hull) == 1 and not result.certified:
        console.print("No option has a gain above its sampling noise, so no budget buys anything.")
    else:
        console.print(table)
    console.print(f"The exact hull has {len(result.hull):,} {'points' if len(result.hull) > 1 else 'point'}.")
    for path in result.files.values():
        console.print(f"  {output.short(path)}", soft_wrap=True)


def sweep_configs(text: str, config: RunConfig) -> list[tuple[float, RunConfig]]:
    """(budget, configuration) for each budget in ``text``, which reads RESOURCE=B1,B2,...

    Every configuration writes to a folder of its own in the configured output directory.

    Raises:
        ConfigurationError: the text does not read like that, or a budget is not allowed.
    """
    from layerlens.config import OptimizationConfig, OutputConfig
    from layerlens.jobs.frontier import BUDGET_FIELDS
    from layerlens.storage import shown

    resource, _, amounts = text.partition("=")
    if resource not in BUDGET_FIELDS or not amounts:
        raise ConfigurationError(
            f"--budget-sweep: got {text!r}; give RESOURCE=B1,B2,... with a resource of {', '.join(BUDGET_FIELDS)}"
        )
    swept = []
    for part in amounts.split(","):
        try:
            budget = float(part)
        except ValueError as error:
            raise ConfigurationError(f"--budget-sweep: {part!r} is not a number") from error
        fields = {**dict(config.optimization), BUDGET_FIELDS[resource]: int(budget) if budget.is_integer() else budget}
        folder = shown(Path(config.output.directory) / f"{resource}-{part.strip()}")
        changed = {"optimization": OptimizationConfig(**fields), "output": OutputConfig(directory=folder)}
        swept.append((budget, config.model_copy(update=changed)))
    return swept


def show_sweep(resource: str, results: Sequence[tuple[float, RunResult]], json: bool, quiet: bool) -> None:
    """One row for each budget, or one JSON value for each."""
    from layerlens.cli.tables import as_json

    if json:
        output.json_result([{"budget": budget, **as_json(result)} for budget, result in results])
    elif not quiet:
        _print_table(resource, results, output.console())


def _print_table(resource: str, results: Sequence[tuple[float, RunResult]], console: Console) -> None:
    from layerlens.cli.tables import new_table

    table = new_table(f"Budgets of {RESOURCE_NAMES[resource]}")
    for name in ("budget", "score", "gap", "layers", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("written to")
    for budget, result in results:
        rows = result.manifest.allocations
        table.add_row(
            amount(resource, budget),
            f"{result.manifest.score:.6g}",
            gap(result.manifest.gap),
            str(sum(row.method != "none" for row in rows)),
            f"{sum(row.cost for row in rows):,}",
            output.short(result.directory),
        )
    console.print(table)
