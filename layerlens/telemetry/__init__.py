"""Metrics and traces of jobs: Prometheus (scraped or pushed) and OpenTelemetry (OTLP over HTTP)."""

from __future__ import annotations

import importlib.util
import os

from layerlens.config import TelemetryConfig
from layerlens.exceptions import ConfigurationError
from layerlens.utils.observer import RunObserver

OTLP_VARIABLES = (
    "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)  # fmt: skip


def telemetry_observers(config: TelemetryConfig) -> list[RunObserver]:
    """Whom a job has to tell, by its configuration and the environment; none when nothing is configured.

    Raises:
        ConfigurationError: the configuration names an address and the package that would send there is missing.
    """
    observers: list[RunObserver] = []
    if config.push_gateway is not None:
        _need("prometheus_client", "telemetry.push_gateway")
        from layerlens.telemetry.metrics import PushObserver

        observers.append(PushObserver(config.push_gateway, config.job))
    from_environment = any(os.environ.get(name) for name in OTLP_VARIABLES)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if config.otlp_endpoint is not None:
        _need("opentelemetry.exporter.otlp.proto.http", "telemetry.otlp_endpoint")
    if (config.otlp_endpoint or (from_environment and _found("opentelemetry.exporter.otlp.proto.http"))) and (
        not disabled
    ):
        from layerlens.telemetry.otlp import OtlpObserver

        observers.append(OtlpObserver(config.otlp_endpoint, config.job))
    return observers


def _need(module: str, key: str) -> None:
    if not _found(module):
        raise ConfigurationError(
            f"{key}: needs packages that are not installed; run: pip install 'layerlens[telemetry]'"
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
