"""Prometheus metrics of jobs, and their push to a gateway: base units last, _total for counters, labels of few values.

One registry for each purpose: the service keeps one for its life, a batch job one that it pushes when it ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from layerlens import __version__
from layerlens.models import Manifest
from layerlens.models.manifest import RunRecord
from layerlens.registry import METHODS
from layerlens.utils.observer import Observer

RUN_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
SUCCEEDED, FAILED, INTERRUPTED = "succeeded", "failed", "interrupted"


class RunMetrics:
    """The metrics of jobs in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        build = Gauge("layerlens_build_info", "Version of LayerLens; always 1.", ["version"], registry=registry)
        build.labels(__version__).set(1)
        self.runs = Counter(
            "layerlens_runs_total", "Jobs that ended, by outcome.", ["kind", "outcome"], registry=registry
        )
        self.run_seconds = Histogram(
            "layerlens_run_duration_seconds", "Wall time of jobs.", ["kind"], buckets=RUN_BUCKETS_S, registry=registry
        )
        self.stage_seconds = Histogram(
            "layerlens_stage_duration_seconds",
            "Wall time of the stages of jobs.",
            ["kind", "stage"],
            buckets=RUN_BUCKETS_S,
            registry=registry,
        )
        self.gap = Gauge(
            "layerlens_solver_gap_ratio", "Proved relative gap of the last choice.", ["kind"], registry=registry
        )
        self.budget_used = Gauge(
            "layerlens_budget_used_ratio",
            "Share of each budget that the last choice uses, including the base model.",
            ["kind", "resource"],
            registry=registry,
        )
        self.adapted = Gauge(
            "layerlens_adapted_layers", "Layers that the last choice adapts.", ["kind", "method"], registry=registry
        )
        self.cache = Counter(
            "layerlens_cache_requests_total",
            "Jobs that looked in the sensitivity cache.",
            ["result"],
            registry=registry,
        )
        self.errors = Counter(
            "layerlens_errors_total", "Jobs that failed, by class of error.", ["kind", "error"], registry=registry
        )

    def stage(self, kind: str, name: str, seconds: float) -> None:
        """A stage ended."""
        self.stage_seconds.labels(kind, name).observe(seconds)

    def ended(self, kind: str, outcome: str, seconds: float, error: str = "") -> None:
        """A job ended; ``error`` is the class of what ended it."""
        self.runs.labels(kind, outcome).inc()
        self.run_seconds.labels(kind).observe(seconds)
        if error:
            self.errors.labels(kind, error).inc()

    def chose(self, record: RunRecord) -> None:
        """What a job that ended well chose, and whether its statistics were there already."""
        if record.statistics_from_cache is not None:
            self.cache.labels("hit" if record.statistics_from_cache else "miss").inc()
        if record.manifest is None:
            return
        self.gap.labels(record.kind).set(record.manifest.gap)
        for resource, share in budget_shares(record.manifest).items():
            self.budget_used.labels(record.kind, resource).set(share)
        for method, count in adapted_layers(record.manifest).items():
            self.adapted.labels(record.kind, method).set(count)


def budget_shares(manifest: Manifest) -> Mapping[str, float]:
    """Share of each budget that is used, of those that have one."""
    return {use.resource: use.total / use.budget for use in manifest.resources if use.budget}


def adapted_layers(manifest: Manifest) -> Mapping[str, int]:
    """How many layers have each method."""
    methods = [row.method for row in manifest.allocations]
    return {method: methods.count(method) for method in METHODS}


def outcome_of(error: BaseException | None) -> str:
    """How a job that ``error`` ended, if anything did, is counted."""
    if error is None:
        return SUCCEEDED
    return FAILED if isinstance(error, Exception) else INTERRUPTED


LONGEST_WAIT_S = 0.8
"""How long one job waits at its end for everything that telemetry sends, all together."""


class Deadline:
    """A moment until which several sendings may take, all together."""

    def __init__(self, seconds: float = LONGEST_WAIT_S) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


def within(deadline: Deadline, send: Callable[[], None]) -> str:
    """Run ``send`` in a thread that may outlive us; "" when it was done in time, else why not, in a line."""
    failure: list[str] = []
    done = threading.Event()

    def work() -> None:
        try:
            send()
        except Exception as error:  # every transport has its own
            failure.append(next(iter(str(error).splitlines()), "") or type(error).__name__)
        finally:
            done.set()

    threading.Thread(target=work, name="layerlens-telemetry", daemon=True).start()
    if not done.wait(deadline.left()):
        return "no answer in time"
    return failure[0] if failure else ""


logger = logging.getLogger(__name__)


class PushObserver(Observer):
    """Collects one job's metrics and replaces those of the same names in the job's group at the gateway."""

    def __init__(self, gateway: str, job: str) -> None:
        from prometheus_client import CollectorRegistry

        self.gateway, self.job = gateway, job
        self.metrics = RunMetrics(CollectorRegistry())
        self.kind, self.start = "", 0.0

    def run_started(self, kind: str, config: Any) -> None:
        """Remember when."""
        self.kind, self.start = kind, time.perf_counter()

    def stage_ended(self, name: str, seconds: float, error: BaseException | None) -> None:
        """Count the stage."""
        self.metrics.stage(self.kind, name, seconds)

    def run_ended(self, record: RunRecord | None, error: BaseException | None) -> None:
        """Push everything; a gateway that cannot be reached is a warning."""
        from prometheus_client import pushadd_to_gateway

        failed = type(error).__name__ if error is not None else ""
        self.metrics.ended(self.kind, outcome_of(error), time.perf_counter() - self.start, failed)
        if record is not None:
            self.metrics.chose(record)
        group = {"kind": self.kind}
        problem = within(
            Deadline(LONGEST_WAIT_S / 2),
            lambda: pushadd_to_gateway(
                self.gateway, self.job, self.metrics.registry, grouping_key=group, timeout=LONGEST_WAIT_S / 2
            ),
        )
        if problem:
            logger.warning("telemetry.push_gateway: %s did not take the metrics (%s)", self.gateway, problem)
