"""The ``layerlens`` program: its commands and the options that stand before them.

Commands import what they call when they are called: ``layerlens --help`` loads neither torch nor NumPy nor pydantic.
"""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from layerlens import __version__
from layerlens.cli import (
    commands_bench,
    commands_cache,
    commands_config,
    commands_doctor,
    commands_estimate,
    commands_evaluate,
    commands_export,
    commands_frontier,
    commands_open,
    commands_optimize,
    commands_pipeline,
    commands_run,
    commands_serve,
    commands_show,
    commands_sweep,
    commands_train,
    output,
)
from layerlens.cli.errors import exit_cleanly
from layerlens.utils.quiet import quiet_torch
from layerlens.utils.threads import let_idle_threads_sleep

app = typer.Typer(
    name="layerlens",
    help="Choose which layers of a model to adapt, with which PEFT method and rank, within hard budgets and with a "
    "proved gap.",
    epilog="Start with: layerlens run --model DIRECTORY --data FILE --max-params 300k",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        output.result(f"layerlens {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log progress to stderr.")] = False,
) -> None:
    """Remember the options that hold for every command."""
    output.state.debug, output.state.verbose = debug, verbose
    output.show_logs()


app.command("init")(commands_config.init)
app.command("validate")(commands_config.validate)
app.command("schema")(commands_config.schema)
app.command("run")(commands_run.run)
app.command("sweep")(commands_sweep.sweep)
app.command("optimize")(commands_optimize.optimize)
app.command("frontier")(commands_frontier.frontier)
app.command("show")(commands_show.show)
app.command("diff")(commands_show.diff)
app.command("estimate")(commands_estimate.estimate)
app.command("apply", help="The same as show --code.")(commands_show.show)
app.command("open")(commands_open.open_report)
app.command("report", help="The same as open.")(commands_open.open_report)
app.command("export")(commands_export.export)
app.command("train")(commands_train.train)
app.command("evaluate")(commands_evaluate.evaluate)
app.command("calibrate")(commands_evaluate.calibrate)
app.command("pipeline")(commands_pipeline.pipeline)
app.command("serve")(commands_serve.serve)
app.command("submit")(commands_serve.submit)
app.command("doctor")(commands_doctor.doctor)
app.command("bench")(commands_bench.bench)
app.add_typer(commands_cache.app, name="cache")
app.add_typer(commands_serve.jobs_app, name="jobs")


@app.command("version")
def version() -> None:
    """Show the version."""
    output.result(f"layerlens {__version__}")


def main() -> NoReturn:
    """Entry point of the ``layerlens`` program."""
    let_idle_threads_sleep()
    quiet_torch()
    exit_cleanly(app)
