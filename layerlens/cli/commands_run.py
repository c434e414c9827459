"""The main job: ``run`` measures, chooses and writes; ``optimize`` chooses again from saved statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerlens.cli import output
from layerlens.cli.errors import guarded
from layerlens.cli.parameters import Config, Debug, Json, Output, Quiet, Set

if TYPE_CHECKING:
    from layerlens.config import RunConfig
    from layerlens.pipeline import RunResult
    from layerlens.utils.progress import Progress

    Job = Callable[[Progress, Callable[[str], None]], RunResult]


@guarded("no result was written; run it again, and statistics that were finished come from the cache")
def run(
    config: Config,
    directory: Output = None,
    settings: Set = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure the model anew, and keep nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model on its data, choose what to adapt within the budgets, and write everything."""
    checked = _load(config, settings, directory)
    from layerlens.pipeline import run_config

    base_dir = config.absolute().parent
    job: Job = lambda progress, warn: run_config(  # noqa: E731 (a def could not be typed in one line)
        checked, base_dir=base_dir, use_cache=not no_cache, progress=progress, warn=warn
    )
    _show(_do(job, quiet), json, quiet)


@guarded("no result was written")
def optimize(
    statistics: Annotated[
        Path,
        typer.Argument(metavar="STATISTICS", help="statistics.safetensors of an earlier run.", show_default=False),
    ],
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file (YAML) with the budgets.", show_default=False)
    ],
    directory: Output = None,
    settings: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Choose again from saved statistics, with other budgets; the model is not loaded."""
    checked = _load(config, settings, directory)
    from layerlens.pipeline import optimize_statistics

    base_dir = config.absolute().parent
    job: Job = lambda progress, warn: optimize_statistics(  # noqa: E731
        statistics, checked, base_dir=base_dir, progress=progress, warn=warn
    )
    _show(_do(job, quiet), json, quiet)


def _load(config: Path, settings: Sequence[str] | None, directory: Path | None) -> RunConfig:
    from layerlens.config import OutputConfig, load_run_config

    checked = load_run_config(config, settings or ())
    if directory is None:
        return checked
    # What is typed is relative to here, unlike what is written in the file.
    return checked.model_copy(update={"output": OutputConfig(directory=str(directory.absolute()))})


def _do(job: Job, quiet: bool) -> RunResult:
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


def _show(result: RunResult, json: bool, quiet: bool) -> None:
    from layerlens.cli.run_summary import as_json, show

    if json:
        output.json_result(as_json(result))
    elif not quiet:
        show(result, output.console())


def _unheard(_line: str) -> None:
    """Warnings under --quiet; the JSON result still has them."""
