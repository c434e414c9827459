"""``layerlens sweep``: many runs as a list of independent tasks, run here or by any scheduler, and their table."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerlens.cli import output
from layerlens.cli.commands_run import do
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json, Quiet
from layerlens.exceptions import SweepError

if TYPE_CHECKING:
    from layerlens.jobs.sweep import Sweep, SweepTask

NAMES_SHOWN = 20


@guarded("finished tasks stay; run it again for the others")
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep's file (YAML).", show_default=False)],
    run: Annotated[bool, typer.Option("--run", help="Run all unfinished tasks on this machine.")] = False,
    task: Annotated[
        int | None, typer.Option("--task", help="Run one task of the list (counted from 0), unless it is finished.")
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Write the results of all tasks as one table (CSV and JSON).")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="With --run: number of tasks at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Threads for a task whose configuration does not set them.", min=1)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the runs of a grid (models, budgets, seeds) as tasks, run them, or collect their results."""
    if run + (task is not None) + collect > 1:
        raise SweepError("--run, --task and --collect: give one of them")
    if jobs != 1 and not run:
        raise SweepError("--jobs: belongs to --run; a scheduler decides how many tasks run at a time")
    from layerlens.jobs.sweep import open_sweep, read_tasks, write_tasks

    opened = open_sweep(file)
    if task is not None:
        _one(opened, read_tasks(opened), task, threads, json, quiet)
    elif collect:
        _collect(opened, read_tasks(opened), json, quiet)
    elif run:
        _all(opened, write_tasks(opened), jobs, json, quiet)
    else:
        _show_list(opened, write_tasks(opened), json, quiet)


def _one(opened: Sweep, tasks: list[SweepTask], number: int, threads: int | None, json: bool, quiet: bool) -> None:
    from layerlens.jobs.sweep_run import run_task
    from layerlens.utils.launch import place_of_this_process

    others = place_of_this_process().rank > 0
    outcome = do(
        lambda progress, warn: run_task(opened, tasks, number, threads=threads, progress=progress, warn=warn),
        quiet or others,
    )
    if json and not others:
        output.json_result({**asdict(tasks[number]), "outcome": outcome})
    elif not (quiet or others):
        output.note(f"task {number} ({tasks[number].name}): {outcome}")


def _all(opened: Sweep, tasks: list[SweepTask], jobs: int, json: bool, quiet: bool) -> None:
    from layerlens.jobs.sweep_run import DONE, FAILED, FINISHED, run_here

    outcome = do(lambda progress, warn: run_here(opened, tasks, jobs=jobs, progress=progress, warn=warn), quiet)
    counts = {kind: sum(value == kind for value in outcome.values()) for kind in (DONE, FINISHED, FAILED)}
    if json:
        output.json_result([{**asdict(each), "outcome": outcome[each.task]} for each in tasks])
    elif not quiet:
        output.note(", ".join(f"{count} {kind}" for kind, count in counts.items()))
        output.note(f"Next: {output.command('sweep', opened.path, '--collect')}")
    if counts[FAILED]:
        logs = output.short(opened.directory / "logs")
        output.error(f"{counts[FAILED]} of {len(tasks)} tasks failed; their output is in {logs}")
        raise typer.Exit(1)


def _show_list(opened: Sweep, tasks: list[SweepTask], json: bool, quiet: bool) -> None:
    if json:
        output.json_result([asdict(task) for task in tasks])
        return
    if quiet:
        return
    finished = sum(opened.manifest_of(task) is not None for task in tasks)
    measured = len({task.measures for task in tasks})
    output.note(
        f"{len(tasks)} tasks, {finished} finished; {measured} measurements, shared by tasks that differ in budgets"
    )
    for each in tasks[:NAMES_SHOWN]:
        output.note(f"  {each.task}  {each.name}")
    if len(tasks) > NAMES_SHOWN:
        output.note(f"  ... {len(tasks) - NAMES_SHOWN} more")
    output.note(f"List: {output.short(opened.directory / 'tasks.jsonl')}")
    output.note(f"Next: {output.command('sweep', opened.path, '--run')}, or give a scheduler one --task each")


def _collect(opened: Sweep, tasks: list[SweepTask], json: bool, quiet: bool) -> None:
    from layerlens.jobs.sweep_run import collect

    rows, files = collect(opened, tasks)
    missing = sum(row["status"] == "missing" for row in rows)
    if json:
        output.json_result(rows)
    elif not quiet:
        _print(rows)
        for path in files.values():
            output.note(f"  {output.short(path)}")
    if missing and not quiet:
        output.warning(f"{missing} of {len(rows)} tasks are not finished; run them with --run or --task")


def _print(rows: list[dict[str, Any]]) -> None:
    from layerlens.cli.output import amount, gap, significant
    from layerlens.cli.tables import new_table

    varied = [name for name in rows[0] if "." in name]
    table = new_table("Results")
    table.add_column("task", justify="right", no_wrap=True)
    for name in varied:
        table.add_column(name.rpartition(".")[2].replace("_", " "))
    for name in ("gain", "gap", "parameters", "memory", "latency", "layers"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row["task"]), *(_plain(row.get(name)) for name in varied)]
        if row["status"] == "missing":
            table.add_row(*cells, "missing", *[""] * 5)
            continue
        costs = [amount(kind, row[kind]) for kind in ("trainable_params", "vram_gb", "latency_ms")]
        table.add_row(*cells, significant(row["predicted_gain"]), gap(row["gap"]), *costs, str(row["layers"]))
    output.console().print(table)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json_module.dumps(value)
