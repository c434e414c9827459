"""The server's metrics: those of its jobs, and those of its HTTP interface."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from layerlens.models.manifest import RunRecord
from layerlens.service.guard import App, Receive, Scope, Send
from layerlens.service.store import CANCELLED, SUCCEEDED, Job, JobStore
from layerlens.telemetry.metrics import RunMetrics

HTTP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
OUTCOMES = {SUCCEEDED: "succeeded", CANCELLED: "interrupted"}


class ServiceMetrics:
    """Everything that /metrics shows."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.registry = CollectorRegistry()
        self.runs = RunMetrics(self.registry)
        self.requests = Counter(
            "layerlens_http_requests_total", "HTTP requests.", ["method", "route", "code"], registry=self.registry
        )
        self.seconds = Histogram(
            "layerlens_http_request_duration_seconds",
            "Time to the end of the answer; event streams are left out.",
            ["method", "route"],
            buckets=HTTP_BUCKETS_S,
            registry=self.registry,
        )
        self.jobs = Gauge("layerlens_jobs", "Jobs in each state.", ["state"], registry=self.registry)

    def job_ended(self, job: Job, seconds: float) -> None:
        """A job has got its last state."""
        outcome = job.outcome or {}
        for stage, duration in outcome.get("stages", {}).items():
            self.runs.stage(job.kind, stage, duration)
        self.runs.ended(job.kind, OUTCOMES.get(job.state, "failed"), seconds, outcome.get("error_type", ""))
        if job.state == SUCCEEDED:
            methods = [method for method, count in outcome["methods"].items() for _ in range(count)]
            manifest: Any = SimpleNamespace(
                gap=outcome["gap"],
                resources=[SimpleNamespace(**use) for use in outcome["resources"]],
                allocations=[SimpleNamespace(method=method) for method in methods],
            )
            cached = outcome["statistics_from_cache"] if job.kind == "run" else None
            self.runs.chose(RunRecord(job.kind, manifest=manifest, statistics_from_cache=cached))

    def exposition(self) -> tuple[bytes, str]:
        """The text for Prometheus, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        for state, count in self.store.counts().items():
            self.jobs.labels(state).set(count)
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class Measured:
    """ASGI middleware that counts requests by the template of their route, which has few values."""

    def __init__(self, app: App, metrics: ServiceMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, code = time.perf_counter(), "500"

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if route != "other" else "other"
            self.metrics.requests.labels(method, route, code).inc()
            if not route.endswith("/events"):
                self.metrics.seconds.labels(method, route).observe(time.perf_counter() - start)
