"""The main job: ``run`` measures, chooses and writes everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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
    read_config,
)

if TYPE_CHECKING:
    from layerlens.config import RunConfig
    from layerlens.config.loader import Setting
    from layerlens.pipeline import RunResult
    from layerlens.utils.progress import Progress

    Result = TypeVar("Result")
    Job = Callable[[Progress, Callable[[str], None]], RunResult]


@guarded("no result was written; run it again, and finished statistics come from the cache")
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
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure the model anew, and do not use the cache.")
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not check the predictions on the model.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model on its data, choose what to adapt within the budgets, and write the results.

    Give a configuration file, or options, or both: options replace settings of the file.
    """
    options = given_options(
        model, data, task, methods, max_params, max_vram, max_flops, max_latency, max_step, objective, quality_margin
    )
    settings = [*(settings or ()), *(["optimization.check_predictions=false"] if no_check else [])]
    checked = load(config, all_settings(config, options, settings), directory)
    from layerlens.cli.tables import as_json
    from layerlens.config.compatibility import refuse_conflicts
    from layerlens.jobs.repeated import run_or_repeat
    from layerlens.tasks.guess import with_task
    from layerlens.utils.launch import place_of_this_process

    base_dir = base_dir_of(config)
    others = place_of_this_process().rank > 0  # what torchrun started beside the first process says nothing
    json, quiet = json and not others, quiet or others
    refuse_conflicts(checked, "run")
    checked, guess = with_task(checked, base_dir)
    if guess is not None and not quiet:
        output.note(str(guess))

    def measured(*arguments: Any, **settings: Any) -> RunResult:
        from layerlens.pipeline import run_config  # it imports torch

        return run_config(*arguments, **settings)

    job: Job = lambda progress, warn: run_or_repeat(  # noqa: E731 (a def could not be typed in one line)
        measured, checked, base_dir=base_dir, use_cache=not no_cache, progress=progress, warn=warn
    )
    result = do(job, quiet)
    if json:
        output.json_result(as_json(result) | ({"guess": asdict(guess)} if guess else {}))
    else:
        show_result(result, json, quiet, explain, verbose)


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


def show_result(result: RunResult, json: bool, quiet: bool, explain: bool, verbose: bool = False) -> None:
    from layerlens.cli.tables import as_json, show

    if json:
        output.json_result(as_json(result))
    elif not quiet:
        show(result, output.console(), explain=explain, sample=verbose)


def _unheard(_line: str) -> None:
    """Warnings under --quiet; the JSON result still has them."""
