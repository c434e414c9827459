"""Starts waiting jobs in processes of their own, watches them, and puts things in order after a crash.

Optimisations are forked from a server process that has everything imported (multiprocessing's forkserver); runs get a
fresh interpreter, because the threads of torch and of the kernels must not cross a fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import multiprocessing
import multiprocessing.process
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from layerlens.exceptions import ConfigurationError
from layerlens.service.settings import ServiceSettings
from layerlens.service.store import CANCELLED, DATABASE, FAILED, FINAL, JOBS, RESULTS, RUNNING, Job, JobStore
from layerlens.service.worker import INTERRUPTED, UNEXPECTED, Order, run_job

logger = logging.getLogger(__name__)

POLL_S, TROUBLE_S, GRACE_S = 0.1, 1.0, 10.0
MOST_STARTS = 100
"""A job that was running whenever the server died may be why it died."""
PRELOAD = ["layerlens.optimization.cpsat", "layerlens.pipeline", "layerlens.service.worker"]
"""What a job that only optimises needs, imported once by the process from which such jobs are forked: a fork then
starts in some 20 ms instead of seconds. Nothing in it may start threads."""


@dataclass
class _Running:
    """A job's process."""

    job: Job
    process: multiprocessing.process.BaseProcess
    start: float
    stop_sent: float | None = None
    timed_out: bool = False


class Scheduler:
    """The jobs of one server.

    Args:
        settings: what the operator decided.
        store: all jobs.
        ended: called with every job that has ended.
    """

    def __init__(self, settings: ServiceSettings, store: JobStore, ended: Callable[[Job, float], None]) -> None:
        self.settings, self.store, self.ended = settings, store, ended
        self.running: dict[str, _Running] = {}
        self.wake = asyncio.Event()
        self.closing = False
        self.forked = multiprocessing.get_context("forkserver")
        self.forked.set_forkserver_preload(PRELOAD)
        self.fresh = multiprocessing.get_context("spawn")
        self.alive_at = time.monotonic()

    def recover(self) -> None:
        """Put in order what a killed server left: its running jobs wait again, unless they fail again and again."""
        for job in self.store.listed(state=RUNNING, limit=1_000_000):
            if job.cancel_requested:
                self.store.finish(job.id, CANCELLED, exit_code=INTERRUPTED)
            elif job.attempts >= MOST_STARTS and not self._folder(job.id, RESULTS).is_dir():
                self._give_up(job)
            else:
                self.store.requeue(job.id, "the server was stopped while the job ran")

    async def work(self) -> None:
        """Run until ``close``."""
        while not self.closing:
            try:
                await self._turn()
                self.alive_at = time.monotonic()
            except (OSError, sqlite3.Error) as error:  # a full disk: jobs go on when there is room again
                logger.error("the scheduler cannot check its jobs: %s", error)
                await asyncio.sleep(TROUBLE_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.wake.wait(), POLL_S)
            self.wake.clear()

    async def _turn(self) -> None:
        """Look after the jobs that run, and start those for which there is room."""
        for one in list(self.running.values()):
            await self._look_after(one)
        while len(self.running) < self.settings.max_running and not self.closing:
            job = await asyncio.to_thread(self.store.claim)
            if job is None:
                break
            await asyncio.to_thread(self._start, job)

    async def close(self) -> None:
        """Stop the jobs; they wait again for the next server."""
        self.closing = True
        for one in self.running.values():
            one.process.terminate()
        end = time.monotonic() + GRACE_S
        for one in list(self.running.values()):
            await asyncio.to_thread(one.process.join, max(0.0, end - time.monotonic()))
            if one.process.exitcode is None:
                one.process.kill()
                await asyncio.to_thread(one.process.join)
            await asyncio.to_thread(self._settle, one)

    def remove(self, job_id: str) -> bool:
        """Forget a job that has ended, with its files."""
        if not self.store.remove(job_id):
            return False
        shutil.rmtree(self._folder(job_id), ignore_errors=True)
        return True

    def _start(self, job: Job) -> None:
        order = Order(self.settings.state_dir, job.id, self.settings.roots, self.settings)
        context = self.forked if job.kind == "optimize" else self.fresh
        process = context.Process(target=run_job, args=(order,), name=f"layerlens-{job.id[:8]}", daemon=False)
        process.start()
        self.running[job.id] = _Running(job, process, time.monotonic())
        logger.info("job %s (%s) started, attempt %d", job.id, job.kind, job.attempts)

    async def _look_after(self, one: _Running) -> None:
        if one.process.exitcode is not None:
            await asyncio.to_thread(self._settle, one)
            return
        now = time.monotonic()
        if one.stop_sent is None:
            one.timed_out = now - one.start > self.settings.job_timeout_s
            found = await asyncio.to_thread(self.store.get, one.job.id)
            if one.timed_out or (found is not None and found.cancel_requested):
                one.process.terminate()
                one.stop_sent = now
        elif now - one.stop_sent > GRACE_S:
            one.process.kill()

    def _settle(self, one: _Running) -> None:
        """Give a job whose process has ended the state that it has not given itself."""
        self.running.pop(one.job.id, None)
        one.process.join()
        job = self.store.get(one.job.id)
        if job is None:
            return
        if job.state not in FINAL:
            if job.cancel_requested:
                self.store.finish(job.id, CANCELLED, exit_code=INTERRUPTED)
            elif one.timed_out:
                error = f"took longer than {self.settings.job_timeout_s:g} s"
                self.store.finish(job.id, FAILED, exit_code=UNEXPECTED, error=error)
            elif self.closing:
                self.store.requeue(job.id, "the server was stopped while the job ran")
                return
            elif job.deaths + 1 >= self.settings.max_attempts:
                self._give_up(job)
            else:
                why = f"its process ended unexpectedly (exit code {one.process.exitcode})"
                self.store.requeue(job.id, why, died=True)
                return
        job = self.store.get(one.job.id)
        if job is not None:
            self.ended(job, time.monotonic() - one.start)
            logger.info("job %s %s", job.id, job.state)

    def _give_up(self, job: Job) -> None:
        error = f"its process died in all {job.attempts} attempts; see its log"
        self.store.finish(job.id, FAILED, exit_code=UNEXPECTED, error=error, outcome={"error_type": "WorkerDied"})

    def _folder(self, job_id: str, *below: str) -> Path:
        return self.settings.state_dir.joinpath(JOBS, job_id, *below)


def open_state(settings: ServiceSettings) -> tuple[JobStore, int]:
    """The store of a state directory, and the descriptor whose lock keeps other servers out.

    Raises:
        ConfigurationError: the directory cannot be used, or another server has it.
    """
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(settings.state_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(f"--state-dir: cannot use {settings.state_dir}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigurationError(
            f"--state-dir: another server uses {settings.state_dir}; stop it, or give this one another directory"
        ) from error
    return JobStore(settings.state_dir / DATABASE), descriptor
