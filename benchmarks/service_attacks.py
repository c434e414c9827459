"""A server with 1,024 descriptors under half-sent requests, 500 submissions at once, 300 listeners, and all together.

    python benchmarks/service_attacks.py --out benchmarks/results/service_attacks.json

A real server process on loopback; every part has a number of connections and an end. The jobs are optimisations of one
small layer, so that the figures are those of the interface. It fails where a promise does not hold: `/healthz` does not
answer within 5 s, a submission that was accepted is lost or done twice, more listeners are let in than may be, the
log has a traceback, or the process holds more descriptors than it may.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/service"))

from serving import TOKEN, Serving

from layerlens.models import LayerSpec, LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.statistics_file import statistics_to_bytes
from layerlens.service.store import DATABASE, FINAL, JobStore

DESCRIPTORS, HALF_SENT, HELD_S = 1024, 1200, 10.0
HEALTH_S = 5.0
"""Deadline of /healthz, whatever else goes on."""
SUBMISSIONS, LISTENERS, STREAMS = 500, 300, 100
BEARER = f"Authorization: Bearer {TOKEN}\r\n"
KINDS = {
    "header": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "body": b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n",
    "body_with_token": f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n{BEARER}Content-Length: 60000\r\n\r\n".encode(),
    "nothing": b"",
}
CONFIG: dict[str, Any] = {
    "model": {"name_or_path": "unused"},
    "data": {"source": "unused"},
    "optimization": {
        "methods": ["lora"], "lora_ranks": [1, 2, 4], "latency_profile": {"batch_size": 1, "sequence_length": 8},
    },
}  # fmt: skip


def statistics() -> bytes:
    """Of four layers."""
    layers = [LayerSpec(f"block.{number}", 16, "linear", methods=("lora",)) for number in range(4)]
    chance = np.random.default_rng(0)

    def measured() -> MethodStatistics:
        spectrum = np.sort(chance.random(8))[::-1].copy()
        total = float(spectrum.sum())
        return MethodStatistics(
            energy=total, trace=2 * total, signal=total, input_mean_square=1.0, spectrum=spectrum,
            plain_spectrum=spectrum,
        )  # fmt: skip

    found = tuple(LayerStatistics(layer.name, {"lora": measured()}) for layer in layers)
    model = {
        "task": "sequence-classification", "dtype": "float32", "labels": ["a", "b"], "num_labels": 2,
        "model_type": "bert", "head_modules": ["classifier"],
    }  # fmt: skip
    identity = {"version": 1, "data": {"source": "none"}, "model": {}, "settings": {}}
    whole = ModelStatistics(found, 8, 80, 1.0, 100.0, 1000.0, provenance={"identity": identity, "model": model})
    return statistics_to_bytes(ModelSpec("small", 5000, layers), whole)


async def request(
    port: int, method: str, path: str, body: bytes = b"", *, token: bool = True, timeout_s: float = 120.0
) -> tuple[int, bytes]:
    """Status and body; 0 where the connection is refused, reset or silent."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += (BEARER if token else "") + f"Content-Length: {len(body)}\r\n\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode() + body)
                answer = await reader.read()
            finally:
                writer.close()
        return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]
    except (OSError, TimeoutError, IndexError, ValueError):
        return 0, b""


@contextlib.asynccontextmanager
async def half_sent(port: int, kind: str, count: int = HALF_SENT) -> AsyncIterator[None]:
    """Connections that send one byte a second; who is cut off comes back."""
    stop = asyncio.Event()

    async def slow() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(30):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    writer.write(KINDS[kind])
                    while not stop.is_set() and not writer.is_closing():
                        if kind != "nothing":
                            writer.write(b"a")
                            await writer.drain()
                        await asyncio.sleep(1)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.5)

    tasks = [asyncio.create_task(slow()) for _ in range(count)]
    try:
        await asyncio.sleep(1)
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def probed(serving: Serving, seconds: float) -> dict[str, Any]:
    """How /healthz and an operation with a token answer meanwhile."""
    assert serving.process is not None
    process, end = psutil.Process(serving.process.pid), time.monotonic() + seconds
    statuses: dict[str, Counter[int]] = {"healthz": Counter(), "jobs": Counter()}
    times: list[float] = []
    descriptors = 0

    async def ask(name: str, path: str) -> None:
        while time.monotonic() < end:
            start = time.monotonic()
            limit = HEALTH_S if name == "healthz" else 60.0
            statuses[name][(await request(serving.port, "GET", path, token=name == "jobs", timeout_s=limit))[0]] += 1
            if name == "healthz":
                times.append(time.monotonic() - start)
            await asyncio.sleep(0.2)

    async def count() -> None:
        nonlocal descriptors
        while time.monotonic() < end:
            descriptors = max(descriptors, process.num_fds())
            await asyncio.sleep(0.1)

    await asyncio.gather(ask("healthz", "/healthz"), ask("jobs", "/v1/jobs"), count())
    return {
        **{name: {str(status): count for status, count in found.items()} for name, found in statuses.items()},
        "healthz_p50_ms": round(1000 * float(np.median(times)), 1),
        "healthz_max_ms": round(1000 * max(times), 1),
        "descriptors_max": descriptors,
    }


async def submitted(port: int, reference: str) -> dict[str, Any]:
    """All submissions at once; clients that must wait come back with the same key."""
    statuses: Counter[int] = Counter()
    times: list[float] = []
    accepted: list[str] = []

    async def one(number: int) -> None:
        optimization = {**CONFIG["optimization"], "max_trainable_params": 40 + number}
        body = json.dumps(
            {"kind": "optimize", "statistics": reference, "config": {**CONFIG, "optimization": optimization}}
        )
        start = time.monotonic()
        for _ in range(60):
            status, answer = await request(port, "POST", "/v1/jobs", body.encode())
            statuses[status] += 1
            if status == 202:
                times.append(time.monotonic() - start)
                accepted.append(json.loads(answer)["id"])
                return
            await asyncio.sleep(1)

    await asyncio.gather(*(one(number) for number in range(SUBMISSIONS)))
    return {
        "statuses": {str(status): count for status, count in statuses.items()},
        "accepted": len(accepted),
        "answer_p50_ms": round(1000 * float(np.median(times)), 1),
        "answer_p95_ms": round(1000 * float(np.quantile(times, 0.95)), 1),
        "answer_max_ms": round(1000 * max(times), 1),
    }


async def listened(port: int, job: str) -> dict[str, Any]:
    """All listeners at once, held until each has its first line, and then gone."""
    statuses: Counter[int] = Counter()
    together, arrived = asyncio.Event(), 0

    async def one() -> None:
        nonlocal arrived
        head = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\n{BEARER}\r\n"
        status = 0
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(120):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head.encode())
                status = int((await reader.readline() or b"x 0").split(b" ")[1])
        statuses[status] += 1
        arrived += 1
        if arrived == LISTENERS:
            together.set()
        await together.wait()
        if status:
            writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(LISTENERS)))
    return {str(status): count for status, count in statuses.items()}


async def settled(store: JobStore, seconds: float) -> dict[str, Any]:
    """Wait for the jobs; how they stand, and how many were begun or ended more than once."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(store.counts()[state] for state in ("queued", "running")):
        await asyncio.sleep(1)
    jobs = store.listed(limit=10_000)
    ends = [sum(e.type == "state" and e.data["state"] in FINAL for e in store.events(job.id)) for job in jobs]
    return {
        "jobs": len(jobs),
        "states": {state: count for state, count in store.counts().items() if count},
        "ended_twice": sum(count > 1 for count in ends),
        "begun_twice": sum(job.attempts > 1 for job in jobs),
    }


async def all_parts(serving: Serving, jobs_s: float) -> dict[str, Any]:
    """One after the other, then all together."""
    port, store = serving.port, JobStore(serving.folder / "state" / DATABASE)
    reference = json.loads((await request(port, "POST", "/v1/statistics", statistics()))[1])["statistics"]
    waiting = {**CONFIG, "optimization": {**CONFIG["optimization"], "max_trainable_params": 39}}
    found: dict[str, Any] = {"half_sent": {}}
    for kind in KINDS:
        async with half_sent(port, kind):
            found["half_sent"][kind] = await probed(serving, HELD_S)
        print(kind, found["half_sent"][kind], file=sys.stderr)
    body = json.dumps({"kind": "optimize", "statistics": reference, "config": waiting}).encode()
    async with half_sent(port, "header"):
        submissions = asyncio.create_task(submitted(port, reference))
        probes = asyncio.create_task(probed(serving, HELD_S))
        while not (jobs := await asyncio.to_thread(store.listed, limit=1)):
            await asyncio.sleep(0.1)
        last = jobs[0].id
        listeners = [await listened(port, last)]
        found["together"] = {"submissions": await submissions, "meanwhile": await probes}
    last = json.loads((await request(port, "POST", "/v1/jobs", body))[1])["id"]  # behind all the others
    found["listeners"] = listeners + [await listened(port, last) for _ in range(2)]
    print(found["together"], found["listeners"], file=sys.stderr)
    found["jobs"] = await settled(store, jobs_s)
    return found


def broken(found: dict[str, Any], log: str) -> list[str]:
    """The promises that did not hold."""
    wrong = []
    for kind, meanwhile in {**found["half_sent"], "together": found["together"]["meanwhile"]}.items():
        answered = meanwhile["healthz"].get("200", 0)
        if answered < sum(meanwhile["healthz"].values()):
            wrong.append(f"{kind}: /healthz answered in time {answered} of {sum(meanwhile['healthz'].values())}")
        if meanwhile["descriptors_max"] >= DESCRIPTORS:
            wrong.append(f"{kind}: {meanwhile}")
    accepted, jobs = found["together"]["submissions"]["accepted"], found["jobs"]
    if accepted != SUBMISSIONS:
        wrong.append(f"{accepted} of {SUBMISSIONS} were accepted")
    for statuses in found["listeners"]:
        if statuses.get("200", 0) > STREAMS:
            wrong.append(f"{statuses['200']} listeners were let in")
    lost = jobs["jobs"] != SUBMISSIONS + 1 or set(jobs["states"]) != {"succeeded"}
    if lost or jobs["ended_twice"] or jobs["begun_twice"]:
        wrong.append(f"jobs: {jobs}")
    return wrong + [line for line in ("Traceback", "is not acquired", "Too many open files") if line in log]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs-s", type=float, default=1800.0, help="wait so long for the jobs to be done")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        options = ("--rate", "100000", "--burst", "100000", "--max-running", "2")
        serving = Serving(Path(name), options, descriptors=DESCRIPTORS).start()
        try:
            start = time.monotonic()
            found = asyncio.run(all_parts(serving, arguments.jobs_s))
        finally:
            serving.stop()
        wrong = broken(found, serving.log)
    found |= {
        "broken_promises": wrong, "descriptors": DESCRIPTORS, "connections": HALF_SENT, "submitted": SUBMISSIONS,
        "seconds": round(time.monotonic() - start), "cores": os.cpu_count(), "load_1_min_after": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
