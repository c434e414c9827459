"""``bench``: quick speeds of this machine and of LayerLens on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerlens.cli import output
from layerlens.cli.commands_run import do
from layerlens.cli.errors import guarded
from layerlens.cli.places import Debug, Json, Quiet

if TYPE_CHECKING:
    from layerlens.bench.speeds import KernelSpeed, Speeds

BUSY = 0.5
"""Load on each core before the start, above which the output says that rates are too low."""


@guarded()
def bench(
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="CPU threads, pinned to as many cores; 0: all cores.")
    ] = 1,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the speed of kernels and solver with this machine's limits, NumPy and torch, in about 10 seconds."""
    from layerlens.utils.threads import resolve_threads, set_threads

    set_threads(resolve_threads(threads))  # before the libraries load, which take their threads from the environment

    def job(progress: Any, warn: Any) -> Speeds:
        from layerlens.bench.speeds import measure_speeds

        return measure_speeds(threads=threads, progress=progress)

    speeds = do(job, quiet)
    if json:
        from dataclasses import asdict

        output.json_result(asdict(speeds))
    elif not quiet:
        _show(speeds)


def _show(speeds: Speeds) -> None:
    from layerlens.cli.output import gap, significant
    from layerlens.cli.tables import new_table

    console, machine = output.console(), speeds.machine
    cores = f" on core{'s' if len(machine['cores']) > 1 else ''} {', '.join(map(str, machine['cores']))}"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}{cores if machine['cores'] else ''}"
    table = new_table(f"{machine['processor']}, {machine['isa']}, {threads}")
    table.add_column("limits")
    table.add_column("", justify="right", no_wrap=True)
    for limit in speeds.limits:
        table.add_row(limit.name, f"{significant(limit.rate)} {limit.unit}")
    console.print(table)
    table = new_table("Kernels", caption="times: how many times longer the fastest form of NumPy or torch takes")
    table.add_column("kernel")
    for name in ("time", "rate", "of the limit", "NumPy", "torch"):
        table.add_column(name, justify="right", no_wrap=True)
    for kernel in speeds.kernels:
        share = "–" if kernel.of_limit is None else f"{kernel.of_limit:.2f}"
        rate = f"{significant(kernel.rate)} {kernel.unit}"
        name = kernel.name.rpartition(" threads=")[0]  # which stands above
        table.add_row(name, _time(kernel.seconds), rate, share, _ratio(kernel, "numpy"), _ratio(kernel, "torch"))
    console.print(table)
    table = new_table("Solver")
    table.add_column("instance")
    for name in ("time", "proved gap"):
        table.add_column(name, justify="right", no_wrap=True)
    for solved in speeds.solver:
        table.add_row(solved.name, _time(solved.seconds), gap(solved.gap))
    console.print(table)
    load, present = machine["load_before"], machine["cores_present"]
    if load is not None and load > BUSY * present:
        output.warning(
            f"the load was {load:.1f} on {present} cores before this began, so rates are lower and times longer than "
            "on an idle machine; ratios to NumPy and torch remain meaningful, because they were measured moments "
            "apart"
        )


def _ratio(kernel: KernelSpeed, family: str) -> str:
    """The fastest peer of a library."""
    found = [ratio for name, ratio in kernel.peers.items() if name.startswith(family)]
    return f"{min(found):.2f}×" if found else "–"


def _time(seconds: float) -> str:
    from layerlens.cli.output import significant

    return f"{significant(1e3 * seconds)} ms" if seconds >= 1e-3 else f"{significant(1e6 * seconds)} µs"
