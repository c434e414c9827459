"""The main job: ``run`` measures, chooses and writes; ``optimize`` chooses again from saved statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from layerlens.cli import output, tables
from layerlens.cli.errors import guarded
from layerlens.cli.output import command, short
from layerlens.cli.parameters import Config, ConfigOption, Debug, Explain, Json, Output, Quiet, Set, Statistics
from layerlens.cli.places import absolute, base_dir_of, read_config

if TYPE_CHECKING:
    from layerlens.config import RunConfig
    from layerlens.pipeline import RunResult
    from layerlens.utils.progress import Progress

    Result = TypeVar("Result")
    Job = Callable[[Progress, Callable[[str], None]], RunResult]


@guarded("no result was written; run it again, and statistics that were finished come from the cache")
def run(
    config: Config,
    directory: Output = None,
    settings: Set = None,
    explain: Explain = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure the model anew, and keep nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model on its data, choose what to adapt within the budgets, and write everything."""
    checked = load(config, settings, directory)
    from layerlens.pipeline import run_config
    from layerlens.utils.launch import place_of_this_process

    base_dir = base_dir_of(config)
    others = place_of_this_process().rank > 0  # what torchrun started beside the first process says nothing
    json, quiet = json and not others, quiet or others
    job: Job = lambda progress, warn: run_config(  # noqa: E731 (a def could not be typed in one line)
        checked, base_dir=base_dir, use_cache=not no_cache, progress=progress, warn=warn
    )
    _show(do(job, quiet), json, quiet, explain)


@guarded("no result was written")
def optimize(
    statistics: Statistics,
    config: ConfigOption,
    directory: Output = None,
    settings: Set = None,
    explain: Explain = False,
    budget_sweep: Annotated[
        str | None,
        typer.Option(
            help="Choose once for each of several budgets, each into its own folder: "
            "trainable_params=10000,20000,40000 (or flops, vram_gb, latency_ms)."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose again from saved statistics, with other budgets; the model is not loaded."""
    checked = load(config, settings, directory)
    from layerlens.pipeline import optimize_statistics

    base_dir = base_dir_of(config)

    def job_for(wanted: RunConfig) -> Job:
        return lambda progress, warn: optimize_statistics(
            statistics, wanted, base_dir=base_dir, progress=progress, warn=warn
        )

    if budget_sweep is None:
        _show(do(job_for(checked), quiet), json, quiet, explain)
        return
    from layerlens.cli.commands_frontier import show_sweep, sweep_configs

    swept = sweep_configs(budget_sweep, checked)
    results = [(budget, do(job_for(wanted), quiet)) for budget, wanted in swept]
    show_sweep(budget_sweep.partition("=")[0], results, json, quiet)


def load(config: Path, settings: Sequence[str] | None, directory: Path | None) -> RunConfig:
    """The checked configuration, with the settings and the output directory of the command line."""
    from layerlens.config import OutputConfig

    checked = read_config(config, settings or ())
    if directory is None:
        return checked
    # What is typed is relative to here, unlike what is written in the file.
    return checked.model_copy(update={"output": OutputConfig(directory=absolute(directory))})


def do(job: Callable[[Progress, Callable[[str], None]], Result], quiet: bool) -> Result:
    """Run the job; progress and warnings go to one console, which keeps bars and lines apart."""
    from layerlens.cli.output import shown_progress
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


def _show(result: RunResult, json: bool, quiet: bool, explain: bool) -> None:
    from layerlens.cli.commands_run import as_json, show

    if json:
        output.json_result(as_json(result))
    elif not quiet:
        show(result, output.console(), explain=explain)


def _unheard(_line: str) -> None:
    """Warnings under --quiet; the JSON result still has them."""


FILE_MEANINGS = {
    "manifest_json": "the choice, its costs and its proof",
    "manifest_yaml": "the same, for reading",
    "peft": "LoRA adapter directory for PEFT, Trainer, TRL ...",
    "modules": "adapters and prefixes, for layerlens.tuning",
    "report": "report, for a browser",
    "solver_log": "bound and incumbent after every stage of the solver",
    "statistics": "what was measured, for `layerlens optimize`",
}


def show(result: RunResult, console: Console, *, explain: bool = False) -> None:
    """Write the summary of a run for people."""
    manifest = result.manifest
    parts = [tables.chosen(manifest), tables.budgets(manifest.resources), tables.certificate(manifest)]
    told = tables.calibration(manifest.predicted)
    if told is not None:
        parts.append(told)
    if explain:
        parts.append(tables.explanations(result.explanations))
    for part in (*parts, tables.measured(result.measured)):
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
    console.print(Text.assemble("Next: ", (next_command(result), "bold")), soft_wrap=True)


def next_command(result: RunResult) -> str:
    """The command to type after a run: see how to train; after ``optimize``, write the adapter first."""
    manifest = short(result.files["manifest_json"])
    if "peft" in result.files or "modules" in result.files:
        return command("apply", manifest)
    return command("apply", manifest, "--output", short(result.directory))


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
        "statistics_from_cache": result.statistics_from_cache,
        "seconds": result.seconds,
        "warnings": list(result.warnings),
    }


def _order(name: str) -> int:
    known = list(FILE_MEANINGS)
    return known.index(name) if name in known else len(known)


def _time(result: RunResult) -> str:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    cached = "; statistics taken from the cache" if result.statistics_from_cache and "profile" in result.seconds else ""
    return f"{sum(result.seconds.values()):.1f} s ({stages}){cached}"
