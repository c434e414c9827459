"""``optimize``: choose again from saved statistics: once, for several budgets, or along the whole curve of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerlens.cli import output
from layerlens.cli.commands_frontier import trace
from layerlens.cli.commands_run import do, show_result
from layerlens.cli.errors import guarded
from layerlens.cli.flags import (
    MaxFlops,
    MaxLatency,
    MaxParams,
    MaxStep,
    MaxVram,
    Methods,
    Objective,
    QualityMargin,
    given_options,
)
from layerlens.cli.output import RESOURCE_NAMES, amount, gap
from layerlens.cli.places import Debug, Explain, Json, Output, Quiet, Set, budget_of
from layerlens.cli.saved import SavedConfig, SavedStatistics, saved_job
from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from layerlens.config import RunConfig
    from layerlens.pipeline import RunResult
    from layerlens.utils.progress import Progress

    Job = Callable[[Progress, Callable[[str], None]], RunResult]

OPTIMIZED = "optimized"


@guarded("no result was written")
def optimize(
    statistics: SavedStatistics,
    config: SavedConfig = None,
    max_params: MaxParams = None,
    max_vram: MaxVram = None,
    max_flops: MaxFlops = None,
    max_latency: MaxLatency = None,
    max_step: MaxStep = None,
    methods: Methods = None,
    objective: Objective = None,
    quality_margin: QualityMargin = None,
    directory: Output = None,
    settings: Set = None,
    explain: Explain = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            "--budget-sweep",
            help="Choose for each of several budgets, each into its own folder: trainable_params=10k,20k,40k (or "
            "flops, vram_gb, latency_ms, step_ms).",
            metavar="RESOURCE=B1,B2,...",
        ),
    ] = None,
    frontier: Annotated[
        str | None,
        typer.Option(
            "--frontier",
            help="Show what a larger budget buys: the exact curve of the score over trainable_params (or flops, "
            "vram_gb, latency_ms, step_ms).",
            metavar="RESOURCE",
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="With --frontier: certify a choice at this budget (20k, 8GB); repeatable."),
    ] = None,
    points: Annotated[
        int, typer.Option(min=2, help="With --frontier: number of budgets to certify without --at.")
    ] = 10,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose again for other budgets from saved statistics, without loading the model.

    `--sweep` chooses for several budgets, and `--frontier` shows what a larger budget buys. Options replace settings of
    the configuration; its other budgets stay. Without a configuration file, the result goes to optimized/ beside the
    statistics, and a frontier goes beside them.
    """
    options = given_options(
        None, None, None, methods, max_params, max_vram, max_flops, max_latency, max_step, objective, quality_margin
    )
    if sweep is not None and frontier is not None:
        raise ConfigurationError("--sweep chooses at the budgets that it lists, --frontier traces a curve; give one")
    if at and frontier is None:
        raise ConfigurationError("--at: sets the budgets at which --frontier certifies; give --frontier RESOURCE too")
    folder = OPTIMIZED if frontier is None else ""
    statistics, checked, base_dir = saved_job(statistics, config, options, settings, directory, folder)
    if frontier is not None:
        trace(statistics, checked, base_dir, frontier, at, points, json=json, quiet=quiet)
        return
    from layerlens.pipeline import optimize_statistics

    def job_for(wanted: RunConfig) -> Job:
        return lambda progress, warn: optimize_statistics(
            statistics, wanted, base_dir=base_dir, progress=progress, warn=warn
        )

    if sweep is None:
        show_result(do(job_for(checked), quiet), json, quiet, explain)
        return
    swept = sweep_configs(sweep, checked)
    results = [(budget, do(job_for(wanted), quiet)) for budget, wanted in swept]
    show_sweep(sweep.partition("=")[0], results, json, quiet)


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
            f"--sweep: got {text!r}; give RESOURCE=B1,B2,... with a resource of {', '.join(BUDGET_FIELDS)}"
        )
    swept = []
    for part in amounts.split(","):
        budget = budget_of(resource, part, "--sweep")
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
