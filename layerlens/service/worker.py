"""One job in a process of its own: from the row in the store to a folder of results.

The folder ``results`` appears by one rename when everything is in it: that is the moment from which a job is done. A
server that starts after a crash finds either the folder (and only notes that) or none (and runs the job again, which
takes its statistics from the cache). A lock on the job's folder keeps a second process out while the first still lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from layerlens.config import OutputConfig, RunConfig
from layerlens.exceptions import LayerLensError
from layerlens.registry import METHODS
from layerlens.service.confinement import check_contents, runs_own_code
from layerlens.service.sandbox import bind, readable, refuse_unpickling
from layerlens.service.settings import ServiceSettings
from layerlens.service.store import CANCELLED, DATABASE, FAILED, JOBS, RESULTS, SUCCEEDED, Job, JobStore
from layerlens.storage import publish, url_of
from layerlens.storage.fetch import DOWNLOADS
from layerlens.utils.atomic import atomic_write_text
from layerlens.utils.observer import Observer, watched_by
from layerlens.utils.places import default_cache_dir, readable_below
from layerlens.utils.progress import Advance

OUTCOME, LOG, TEMPORARY = "outcome.json", "log.txt", "tmp"
PROGRESS_EVERY_S = 0.5
UNEXPECTED, INTERRUPTED = 1, 130
NICENESS = 5
"""Jobs take what the server leaves: it answers while all cores compute."""


class Stopped(BaseException):
    """SIGTERM: the job was cancelled, took too long, or the server ends."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What a worker process is started with.

    Args:
        state_dir: the server's state.
        job_id: which job.
        roots: folders that models and data lie in; relative paths start from the first.
        settings: what the operator decided; None where a test asks for the work alone.
    """

    state_dir: Path
    job_id: str
    roots: tuple[Path, ...]
    settings: ServiceSettings | None = None

    @property
    def folder(self) -> Path:
        """The job's own folder."""
        return self.state_dir / JOBS / self.job_id


def run_job(order: Order) -> None:
    """Entry point of the process."""
    os.setpgid(0, 0)  # Ctrl-C at the server's terminal is the server's business
    os.nice(NICENESS)
    order.folder.mkdir(parents=True, exist_ok=True)
    _log_to(order.folder / LOG)
    _die_with_server()
    store = JobStore(order.state_dir / DATABASE)
    with _only_one(order.folder):
        job = store.get(order.job_id)
        if job is None or job.final:
            return
        signal.signal(signal.SIGTERM, _stop)
        try:
            if order.settings is not None:
                _bind(order, RunConfig.model_validate(job.config), job.kind, order.settings)
            outcome = _work(order, job, store)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on it is done, whoever wants it to end
            store.finish(job.id, SUCCEEDED, outcome=outcome)
        except Stopped:
            found = store.get(order.job_id)
            if found is not None and found.cancel_requested:
                store.finish(job.id, CANCELLED, exit_code=INTERRUPTED)
            # else the server ends: it or its successor lets the job wait again
        except LayerLensError as error:
            outcome = {"error_type": type(error).__name__}
            store.finish(job.id, FAILED, exit_code=error.exit_code, error=str(error), outcome=outcome)
        except MemoryError:
            store.finish(
                job.id, FAILED, exit_code=UNEXPECTED, error="out of memory", outcome={"error_type": "MemoryError"}
            )
        except Exception as error:  # what nobody foresaw must not look like a crash that is worth another try
            import traceback

            traceback.print_exc()  # to the job's log, not to the client
            text = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
            outcome = {"error_type": type(error).__name__}
            store.finish(job.id, FAILED, exit_code=UNEXPECTED, error=text, outcome=outcome)
        finally:
            shutil.rmtree(order.folder / TEMPORARY, ignore_errors=True)


def _bind(order: Order, config: RunConfig, kind: str, settings: ServiceSettings) -> None:
    """Bind this process to what the operator allows, and look once more at what the configuration names."""
    if runs_own_code(config):
        return
    temporary = order.folder / TEMPORARY
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
    os.chdir(order.folder)  # names without a folder are looked for there
    bind(readable(settings.roots, settings.state_dir, urls=bool(settings.allow_urls)))
    if kind == "run":
        check_contents(config, settings)
        if not settings.allow_pickles:
            refuse_unpickling()


def _work(order: Order, job: Job, store: JobStore) -> dict[str, Any]:
    """Do what the job asks for; what its outcome was."""
    results = order.folder / RESULTS
    config = RunConfig.model_validate(job.config)
    target = url_of(config.output.directory)
    if not results.is_dir():
        from layerlens.pipeline import optimize_statistics, run_config

        work = order.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        local = config.model_copy(update={"output": OutputConfig(directory=str(work))})
        watcher = _Watcher(store, job.id)
        keywords: dict[str, Any] = {"base_dir": order.roots[0], "progress": watcher, "warn": watcher.warn}
        fetched = default_cache_dir() / DOWNLOADS
        with watched_by(watcher), _traced(job.traceparent), readable_below((*order.roots, fetched)):
            if job.kind == "optimize":
                assert job.statistics is not None
                result = optimize_statistics(Path(job.statistics), local, **keywords)
            else:
                result = run_config(local, **keywords)
        watcher.stage_started("write")
        atomic_write_text(work / OUTCOME, json.dumps(_outcome(result, work, watcher), indent=2))
        os.rename(work, results)
    outcome: dict[str, Any] = json.loads((results / OUTCOME).read_text(encoding="utf-8"))
    if target is not None:  # can be done twice: the same bytes go to the same place
        publish(results, target, owned=[path.name for path in results.iterdir()])
        outcome["published"] = target
    return outcome


def _outcome(result: Any, work: Path, watcher: _Watcher) -> dict[str, Any]:
    """What status, metrics and clients need of a result, beside its files."""
    manifest = result.manifest
    return {
        "files": {name: path.relative_to(work).as_posix() for name, path in result.files.items()},
        "score": manifest.score,
        "upper_bound": manifest.upper_bound,
        "gap": manifest.gap,
        "status": manifest.status,
        "solver": manifest.solver,
        "resources": [dataclasses.asdict(use) for use in manifest.resources],
        "methods": {method: sum(row.method == method for row in manifest.allocations) for method in METHODS},
        "statistics_from_cache": result.statistics_from_cache,
        "seconds": result.seconds,
        "stages": watcher.stages,
        "measured": result.measured,
        "warnings": list(result.warnings),
    }


class _Watcher(Observer):
    """Turns what a job tells into events of the store."""

    def __init__(self, store: JobStore, job_id: str) -> None:
        self.store, self.job_id = store, job_id
        self.stages: dict[str, float] = {}

    def stage_started(self, name: str) -> None:
        self.store.tell(self.job_id, "stage", {"stage": name, "state": "started"})

    def stage_ended(self, name: str, seconds: float, error: BaseException | None) -> None:
        self.stages[name] = seconds
        state = "ended" if error is None else "failed"
        self.store.tell(self.job_id, "stage", {"stage": name, "state": state, "seconds": round(seconds, 3)})

    def warn(self, line: str) -> None:
        """A line for the user."""
        self.store.tell(self.job_id, "warning", {"message": line})

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """See ``utils.progress``; a few events a second at most."""
        done, last = 0, time.monotonic()

        def advance(steps: int = 1, /, note: str = "") -> None:
            nonlocal done, last
            done += steps
            if time.monotonic() - last >= PROGRESS_EVERY_S:
                last = time.monotonic()
                told = {"step": description, "done": done, "total": total, **({"note": note} if note else {})}
                self.store.tell(self.job_id, "progress", told)

        self.store.tell(self.job_id, "progress", {"step": description, "done": 0, "total": total})
        yield advance


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Wait until no other process works on this job; the kernel drops the lock with the process that holds it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _traced(traceparent: str | None) -> Iterator[None]:
    """The request's trace context, where telemetry looks for it."""
    before = os.environ.get("TRACEPARENT")
    if traceparent is not None:
        os.environ["TRACEPARENT"] = traceparent
    try:
        yield
    finally:
        if traceparent is not None:
            os.environ.pop("TRACEPARENT")
            if before is not None:
                os.environ["TRACEPARENT"] = before


def _die_with_server() -> None:
    """End this process when the server's does, even by SIGKILL: its successor runs the job again."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="layerlens-parent", daemon=True).start()


def _log_to(path: Path) -> None:
    """What this process and its libraries print, for the operator."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break the cleaning up
    raise Stopped
