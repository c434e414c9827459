"""The main job: ``run`` measures, chooses and writes; ``optimize`` chooses again from saved statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.flags import (
    Data,
    MaxFlops,
    MaxLatency,
    MaxParams,
    MaxStep,
    MaxVram,
    Methods,
    Model,
    Objective,
    OptionalConfig,
    QualityMargin,
    TaskOption,
    all_settings,
    given_options,
)
from layerlens.cli.output import RESOURCE_NAMES, amount, gap
from layerlens.cli.places import (
    Debug,
    Explain,
    Json,
    Output,
    Quiet,
    Set,
    Verbose,
    absolute,
    base_dir_of,
    budget_of,
    read_config,
)
from layerlens.cli.saved import SavedConfig, SavedStatistics, saved_job
from layerlens.exceptions import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from layerlens.config import RunConfig
    from layerlens.config.loader import Setting
    from layerlens.pipeline import RunResult
    from layerlens.utils.progress import Progress

    Result = TypeVar("Result")
    Job = Callable[[Progress, Callable[[str], None]], RunResult]

OPTIMIZED = "optimized"


@guarded("no result was written; run it again, and statistics that were finished come from the cache")
def run(
    config: OptionalConfig = None,
    model: Model = None,
    data: Data = None,
    task: TaskOption = None,
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
    verbose: Verbose = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure the model anew, and keep nothing.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not hold the predictions against the model afterwards.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model on its data, choose what to adapt within the budgets, and write everything.

    What is to be done stands in a configuration file, in options, or in a file of which options replace settings.
    """
    options = given_options(
        model, data, task, methods, max_params, max_vram, max_flops, max_latency, max_step, objective, quality_margin
    )
    settings = [*(settings or ()), *(["optimization.check_predictions=false"] if no_check else [])]
    checked = load(config, all_settings(config, options, settings), directory)
    from layerlens.cli.tables import as_json
    from layerlens.config.compatibility import refuse_conflicts
    from layerlens.pipeline import run_config
    from layerlens.tasks.guess import with_task
    from layerlens.utils.launch import place_of_this_process

    base_dir = base_dir_of(config)
    others = place_of_this_process().rank > 0  # what torchrun started beside the first process says nothing
    json, quiet = json and not others, quiet or others
    refuse_conflicts(checked, "run")
    checked, guess = with_task(checked, base_dir)
    if guess is not None and not quiet:
        output.note(str(guess))
    job: Job = lambda progress, warn: run_config(  # noqa: E731 (a def could not be typed in one line)
        checked, base_dir=base_dir, use_cache=not no_cache, progress=progress, warn=warn
    )
    result = do(job, quiet)
    if json:
        output.json_result(as_json(result) | ({"guess": asdict(guess)} if guess else {}))
    else:
        _show(result, json, quiet, explain, verbose)


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
    budget_sweep: Annotated[
        str | None,
        typer.Option(
            help="Choose once for each of several budgets, each into its own folder: "
            "trainable_params=10k,20k,40k (or flops, vram_gb, latency_ms, step_ms)."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose again from saved statistics, with other budgets; the model is not loaded.

    Options replace settings of the configuration; its other budgets stay. Without a file the result goes to optimized/
    beside the statistics.
    """
    options = given_options(
        None, None, None, methods, max_params, max_vram, max_flops, max_latency, max_step, objective, quality_margin
    )
    statistics, checked, base_dir = saved_job(statistics, config, options, settings, directory, OPTIMIZED)
    from layerlens.pipeline import optimize_statistics

    def job_for(wanted: RunConfig) -> Job:
        return lambda progress, warn: optimize_statistics(
            statistics, wanted, base_dir=base_dir, progress=progress, warn=warn
        )

    if budget_sweep is None:
        _show(do(job_for(checked), quiet), json, quiet, explain)
        return
    swept = sweep_configs(budget_sweep, checked)
    results = [(budget, do(job_for(wanted), quiet)) for budget, wanted in swept]
    show_sweep(budget_sweep.partition("=")[0], results, json, quiet)


def load(config: Path | None, settings: Sequence[str | Setting] | None, directory: Path | None) -> RunConfig:
    """The checked configuration, with the settings and the output directory of the command line."""
    from layerlens.config import OutputConfig

    checked = read_config(config, settings or ())
    if directory is None:
        return checked
    # What is typed is relative to here, unlike what is written in the file.
    return checked.model_copy(update={"output": OutputConfig(directory=absolute(directory))})


def do(job: Callable[[Progress, Callable[[str], None]], Result], quiet: bool) -> Result:
    """Run the job; progress and warnings go to one console, which keeps bars and lines apart."""
    from layerlens.cli.progress import shown_progress
    from layerlens.utils.progress import silent

    output.show_logs(quiet=quiet)
    if quiet:
        return job(silent, _unheard)
    output.state.live = output.console()
    try:
        with shown_progress(output.state.live) as progress:
            return job(progress, output.warning)
    finally:
        output.state.live = None


def _show(result: RunResult, json: bool, quiet: bool, explain: bool, verbose: bool = False) -> None:
    from layerlens.cli.tables import as_json, show

    if json:
        output.json_result(as_json(result))
    elif not quiet:
        show(result, output.console(), explain=explain, sample=verbose)


def _unheard(_line: str) -> None:
    """Warnings under --quiet; the JSON result still has them."""


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
        budget = budget_of(resource, part, "--budget-sweep")
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
