"""Running the tasks of a sweep, one or all that are not finished, and their results as one table."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerlens.exceptions import SweepError
from layerlens.jobs.run import run_config
from layerlens.jobs.sweep import LOCKS, LOGS, Sweep, SweepTask
from layerlens.models import Manifest
from layerlens.registry import METHODS
from layerlens.utils.atomic import atomic_write_text
from layerlens.utils.launch import place_of_this_process
from layerlens.utils.progress import Progress, silent
from layerlens.utils.threads import available_cores

POLL_S = 0.1
FINISHED, DONE, FAILED = "finished before", "done", "failed"
CSV_FILE, JSON_FILE = "table.csv", "table.json"


def run_task(
    sweep: Sweep,
    tasks: Sequence[SweepTask],
    number: int,
    *,
    threads: int | None = None,
    progress: Progress = silent,
    warn: Callable[[str], None] = lambda line: None,
) -> str:
    """Run one task unless it is finished; what came of it.

    Raises:
        SweepError: there is no such task.
        LayerLensError: as ``run_config`` raises it.
    """
    if not 0 <= number < len(tasks):
        raise SweepError(f"--task {number}: the list has the tasks 0 to {len(tasks) - 1}")
    task = tasks[number]
    config = sweep.config_of(task)
    if sweep.manifest_of(task, config) is not None:
        return FINISHED
    if threads is not None and config.runtime.threads == 0:
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"threads": threads})})
    with _measured_once(sweep, tasks, task, warn):
        run_config(config, base_dir=sweep.folder / task.base_dir, progress=progress, warn=warn)
    return DONE


def run_here(
    sweep: Sweep,
    tasks: Sequence[SweepTask],
    *,
    jobs: int,
    progress: Progress = silent,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[int, str]:
    """Run all tasks that are not finished, ``jobs`` at a time; task -> what came of it.

    A task that fails does not stop the others. Each writes what it says to a file of its own in ``logs``.

    Raises:
        SweepError: there are more jobs than cores.
    """
    cores = available_cores()
    if not 1 <= jobs <= cores:
        raise SweepError(f"--jobs: must be 1 to {cores}, the cores of this machine, got {jobs}")
    outcome = {task.task: FINISHED for task in tasks if sweep.manifest_of(task) is not None}
    waiting = _one_of_each_first([task for task in tasks if task.task not in outcome])
    running: list[tuple[SweepTask, subprocess.Popen[bytes]]] = []
    with progress.stage("Running tasks", total=len(tasks)) as advance:
        advance(len(outcome))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    task = waiting.pop(0)
                    running.append((task, _start(sweep, task, cores // jobs)))
                for task, process in list(running):
                    if process.poll() is not None:
                        running.remove((task, process))
                        outcome[task.task] = DONE if process.returncode == 0 else FAILED
                        if process.returncode:
                            warn(f"task {task.task} ({task.name}): {_last_line(_log(sweep, task))}")
                        advance(1)
                time.sleep(POLL_S)
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()
    return dict(sorted(outcome.items()))


def _start(sweep: Sweep, task: SweepTask, threads: int) -> subprocess.Popen[bytes]:
    """The task in a process of its own."""
    log = _log(sweep, task)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "layerlens", "sweep", str(sweep.path.absolute()), "--task", str(task.task)]
    with log.open("wb") as file:
        return subprocess.Popen([*command, "--threads", str(max(1, threads))], stdout=file, stderr=file)


def _one_of_each_first(tasks: Sequence[SweepTask]) -> list[SweepTask]:
    """One task of every measurement first, so that the others find its statistics in the cache."""
    first: dict[str, SweepTask] = {}
    for task in tasks:
        first.setdefault(task.measures, task)
    return [*first.values(), *(task for task in tasks if task is not first[task.measures])]


@contextmanager
def _measured_once(
    sweep: Sweep, tasks: Sequence[SweepTask], task: SweepTask, warn: Callable[[str], None]
) -> Iterator[None]:
    """Wait for another task that measures the same, unless one of them has finished.

    The lock is a file's: where a file system has none, both measure, and nothing else is lost.
    """
    alike = [other for other in tasks if other.measures == task.measures and other != task]
    if place_of_this_process().rank or not alike:
        yield
        return
    path = sweep.directory / LOCKS / f"{task.measures}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            warn("waiting for another task of the sweep that measures the same")
            _lock(descriptor, fcntl.LOCK_EX)
        if any(sweep.manifest_of(other) is not None for other in alike):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        return False
    return True


def _log(sweep: Sweep, task: SweepTask) -> Path:
    return sweep.directory / LOGS / f"{task.name}.log"


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"failed without a message; see {path}"


def collect(sweep: Sweep, tasks: Sequence[SweepTask]) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """One row for each task, and the two files that they are written to.

    Numbers of a task that is not finished are None (empty in the CSV).

    Raises:
        OutputError: the directory cannot be written.
    """
    rows = [_row(sweep, task) for task in tasks]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row.get(name) for name in columns} for row in rows)
    files = {
        "csv": atomic_write_text(sweep.directory / CSV_FILE, text.getvalue()),
        "json": atomic_write_text(sweep.directory / JSON_FILE, json.dumps(rows, indent=2) + "\n"),
    }
    return rows, files


def _row(sweep: Sweep, task: SweepTask) -> dict[str, Any]:
    manifest = sweep.manifest_of(task)
    status = {"status": "missing" if manifest is None else manifest.status}
    return {"task": task.task, "name": task.name, **task.settings, **status, **_numbers(manifest)}


def _numbers(manifest: Manifest | None) -> dict[str, Any]:
    """Utility, certificate and costs of a manifest."""
    uses = {} if manifest is None else {use.resource: use.total for use in manifest.resources}
    rows = () if manifest is None else manifest.allocations
    adapted = [row for row in rows if row.method != "none"]
    counts = {method: sum(row.method == method for row in adapted) for method in METHODS}
    return {
        "predicted_gain": manifest and manifest.predicted.gain,
        "gain_unit": manifest and manifest.utility_unit,
        "score": manifest and manifest.score,
        "upper_bound": manifest and manifest.upper_bound,
        "gap": manifest and manifest.gap,
        **{resource: uses.get(resource) for resource in ("trainable_params", "flops", "vram_gb", "latency_ms")},
        "layers": manifest and len(adapted),
        **{method: manifest and count for method, count in counts.items()},
        "statistics": manifest and (manifest.provenance.statistics or {}).get("key"),
    }
