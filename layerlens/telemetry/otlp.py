"""OpenTelemetry: one trace for each job with one span for each stage, and the job's metrics, by OTLP over HTTP.

The trace goes on where TRACEPARENT (W3C trace context) of the environment says; the service puts a request's own
context there. Spans leave in the background while the job works; at its end it waits half a second for
what is left. Nothing is registered globally and nothing waits at exit.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from layerlens import __version__
from layerlens.models.manifest import RunRecord
from layerlens.storage.filesystem import redacted
from layerlens.telemetry.metrics import LONGEST_WAIT_S, Deadline, adapted_layers, budget_shares, outcome_of, within
from layerlens.utils.observer import Observer

logger = logging.getLogger(__name__)
# The exporters log every failed attempt, and Python shows that where nobody listens; a job says it once.
logging.getLogger("opentelemetry").addHandler(logging.NullHandler())

SPANS_EVERY_MS, METRICS_EVERY_MS = 1_000, 15_000


class OtlpObserver(Observer):
    """One job's trace and metrics."""

    def __init__(self, endpoint: str | None, service_name: str) -> None:
        self.place = endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "the collector")
        base = endpoint.rstrip("/") if endpoint else None
        resource = Resource.create(
            {"service.name": os.environ.get("OTEL_SERVICE_NAME", service_name), "service.version": __version__}
        )
        wait = LONGEST_WAIT_S / 2
        self.spans = _Counted(OTLPSpanExporter(endpoint=base and f"{base}/v1/traces", timeout=wait))
        self.tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.tracers.add_span_processor(BatchSpanProcessor(self.spans, schedule_delay_millis=SPANS_EVERY_MS))
        exporter = OTLPMetricExporter(endpoint=base and f"{base}/v1/metrics", timeout=wait)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=METRICS_EVERY_MS)
        self.meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        self.tracer = self.tracers.get_tracer("layerlens", __version__)
        self.instruments = _Instruments(self.meters.get_meter("layerlens", __version__))
        self.kind, self.start = "", 0.0
        self.root: Span | None = None
        self.open: list[Span] = []

    def run_started(self, kind: str, config: Any) -> None:
        """Open the job's span, below the one that the environment names."""
        carrier = {name: os.environ.get(name.upper(), "") for name in ("traceparent", "tracestate")}
        context = TraceContextTextMapPropagator().extract({name: value for name, value in carrier.items() if value})
        self.kind, self.start = kind, time.perf_counter()
        facts = {"layerlens.kind": kind, "layerlens.model": redacted(config.model.name_or_path)}
        self.root = self.tracer.start_span(f"layerlens {kind}", context=context, attributes=facts)

    def stage_started(self, name: str) -> None:
        """Open the stage's span."""
        assert self.root is not None
        parent = trace.set_span_in_context(self.open[-1] if self.open else self.root)
        self.open.append(self.tracer.start_span(name, context=parent, attributes={"layerlens.stage": name}))

    def stage_ended(self, name: str, seconds: float, error: BaseException | None) -> None:
        """Close it, and measure it."""
        _close(self.open.pop(), error)
        self.instruments.stage_seconds.record(seconds, {"kind": self.kind, "stage": name})

    def run_ended(self, record: RunRecord | None, error: BaseException | None) -> None:
        """Close the job's span and send what is left; a collector that cannot be reached is a warning."""
        assert self.root is not None
        labels = {"kind": self.kind, "outcome": outcome_of(error)}
        self.instruments.runs.add(1, labels)
        self.instruments.run_seconds.record(time.perf_counter() - self.start, {"kind": self.kind})
        if error is not None:
            self.instruments.errors.add(1, {"kind": self.kind, "error": type(error).__name__})
        if record is not None:
            self._record(record)
        _close(self.root, error)
        deadline = Deadline(LONGEST_WAIT_S / 2)
        problem = within(deadline, self._send)
        if problem or self.spans.failed:
            why = problem or "not reachable, or refused"
            logger.warning("telemetry: %s did not take all traces and metrics (%s)", redacted(self.place), why)

    def _record(self, record: RunRecord) -> None:
        assert self.root is not None
        if record.statistics_from_cache is not None:
            self.instruments.cache.add(1, {"result": "hit" if record.statistics_from_cache else "miss"})
        manifest = record.manifest
        if manifest is None:
            return
        self.root.set_attribute("layerlens.score", manifest.score)
        self.root.set_attribute("layerlens.gap", manifest.gap)
        self.root.set_attribute("layerlens.status", manifest.status)
        self.instruments.gap.set(manifest.gap, {"kind": self.kind})
        for resource, share in budget_shares(manifest).items():
            self.instruments.budget_used.set(share, {"kind": self.kind, "resource": resource})
        for method, count in adapted_layers(manifest).items():
            self.instruments.adapted.set(count, {"kind": self.kind, "method": method})

    def _send(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown(timeout_millis=1000 * LONGEST_WAIT_S / 2)


class _Instruments:
    """The same figures as in ``telemetry.metrics``, by OpenTelemetry's conventions for names and units."""

    def __init__(self, meter: Any) -> None:
        self.runs = meter.create_counter("layerlens.runs", "{run}", "Jobs that ended, by outcome.")
        self.run_seconds = meter.create_histogram("layerlens.run.duration", "s", "Wall time of jobs.")
        self.stage_seconds = meter.create_histogram("layerlens.stage.duration", "s", "Wall time of stages.")
        self.gap = meter.create_gauge("layerlens.solver.gap", "1", "Proved relative gap of the last choice.")
        self.budget_used = meter.create_gauge("layerlens.budget.used", "1", "Share of each budget in use.")
        self.adapted = meter.create_gauge("layerlens.adapted", "{layer}", "Layers that the last choice adapts.")
        self.cache = meter.create_counter("layerlens.cache.requests", "{request}", "Questions to the cache.")
        self.errors = meter.create_counter("layerlens.errors", "{error}", "Jobs that failed, by class of error.")


class _Counted(SpanExporter):
    """An exporter that remembers whether anything was lost."""

    def __init__(self, exporter: SpanExporter) -> None:
        self.exporter = exporter
        self.failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self.exporter.export(spans)
        self.failed |= result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self) -> None:
        self.exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self.exporter.force_flush(timeout_millis)


def _close(span: Span, error: BaseException | None) -> None:
    if error is not None:
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        span.set_attribute("error.type", type(error).__name__)
    span.end()
