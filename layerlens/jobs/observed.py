"""Jobs tell what they do to whom the configuration names: telemetry and experiment trackers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from layerlens.config import RunConfig
from layerlens.models.run_record import RunRecord
from layerlens.telemetry import telemetry_observers
from layerlens.tracking import tracking_observers
from layerlens.utils.launch import is_main_process
from layerlens.utils.observer import RunObserver, observe

Job = TypeVar("Job", bound=Callable[..., Any])


def observed(kind: str) -> Callable[[Job], Job]:
    """Decorator of a job that takes a RunConfig and returns a result with ``files`` and perhaps a manifest.

    Raises:
        ConfigurationError: a tracker or exporter that the configuration names is not installed.
        TrackingError: the tracking server cannot be reached; nothing has been done yet.
    """

    def decorate(job: Job) -> Job:
        @functools.wraps(job)
        def run(*args: Any, **keywords: Any) -> Any:
            config = next(value for value in (*args, *keywords.values()) if isinstance(value, RunConfig))
            observers: list[RunObserver] = []
            if is_main_process():
                observers += [*telemetry_observers(config.telemetry), *tracking_observers(config.tracking)]
            return observe(lambda: job(*args, **keywords), kind, config, observers, lambda result: record(kind, result))

        return run  # type: ignore[return-value]

    return decorate


def record(kind: str, result: Any) -> RunRecord:
    """What observers are told of a result."""
    return RunRecord(
        kind,
        manifest=getattr(result, "manifest", None),
        files=result.files,
        seconds=getattr(result, "seconds", {}),
        measured=getattr(result, "measured", {}),
        metrics=getattr(result, "metrics", {}),
        steps=getattr(result, "steps", ()),
        statistics_from_cache=getattr(result, "statistics_from_cache", None) if kind == "run" else None,
    )
