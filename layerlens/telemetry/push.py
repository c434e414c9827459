"""Pushing a batch job's metrics to a Prometheus push gateway when it ends."""

from __future__ import annotations

import logging
import time
from typing import Any

from layerlens.models.manifest import RunRecord
from layerlens.telemetry.bounded import LONGEST_WAIT_S, Deadline, within
from layerlens.telemetry.metrics import RunMetrics, outcome_of
from layerlens.utils.observer import Observer

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
