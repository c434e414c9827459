"""Prometheus metrics of jobs: names end in their base unit, counters in _total, labels have few values.

One registry for each purpose: the service keeps one for its life, a batch job one that it pushes when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from layerlens import __version__
from layerlens.models import Manifest
from layerlens.models.manifest import RunRecord
from layerlens.registry import METHODS

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
            "Share of each budget that the last choice uses, the base model included.",
            ["kind", "resource"],
            registry=registry,
        )
        self.adapted = Gauge(
            "layerlens_adapted_layers", "Layers that the last choice adapts.", ["kind", "method"], registry=registry
        )
        self.cache = Counter(
            "layerlens_cache_requests_total", "Jobs that asked the sensitivity cache.", ["result"], registry=registry
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
