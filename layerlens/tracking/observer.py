"""From what a job tells to what a tracker is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from layerlens.config import TrackingConfig
from layerlens.exceptions import ConfigurationError
from layerlens.models.manifest import RunRecord
from layerlens.storage import local_file
from layerlens.tracking.protocol import Parameter, Tracker
from layerlens.utils.observer import Observer, RunObserver

ENTRY_POINTS = "layerlens.trackers"
ARTEFACTS = ("manifest_json", "manifest_yaml", "report", "solver_log", "metrics", "runs")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "layerlens_modules.safetensors")
"""What ``layerlens.tuning.load`` reads."""


def tracking_observers(config: TrackingConfig) -> list[RunObserver]:
    """One observer for each tracker that the configuration names.

    Raises:
        ConfigurationError: no such tracker, or its package is not installed.
    """
    return [TrackingObserver(_factory(name)(config)) for name in config.trackers]


def _factory(name: str) -> Callable[[TrackingConfig], Tracker]:
    if name == "mlflow":
        return _mlflow
    if name == "tensorboard":
        return _tensorboard
    found = {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}
    if name not in found:
        known = ", ".join(["mlflow", "tensorboard", *sorted(found)])
        raise ConfigurationError(f"tracking.trackers: unknown tracker {name!r}; known: {known}")
    factory: Callable[[TrackingConfig], Tracker] = found[name].load()
    return factory


def _mlflow(config: TrackingConfig) -> Tracker:
    try:
        from layerlens.tracking.mlflow_tracker import MlflowTracker
    except ModuleNotFoundError as error:
        raise _missing("mlflow") from error
    return MlflowTracker(config)


def _tensorboard(config: TrackingConfig) -> Tracker:
    try:
        from layerlens.tracking.tensorboard_tracker import TensorboardTracker
    except ModuleNotFoundError as error:
        raise _missing("tensorboard") from error
    return TensorboardTracker(config)


def _missing(name: str) -> ConfigurationError:
    return ConfigurationError(f"tracking.trackers: {name} is not installed; run: pip install 'layerlens[tracking]'")


class TrackingObserver(Observer):
    """Tells one tracker of one job."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def run_started(self, kind: str, config: Any) -> None:
        """Open the run with the job's parameters."""
        kept = config.model_dump(mode="json", exclude={"tracking", "telemetry", "output"})
        self.tracker.start(kind, dict(flat(kept)))

    def run_ended(self, record: RunRecord | None, error: BaseException | None) -> None:
        """Log figures, files and the adapter, and close the run."""
        if record is None:
            self.tracker.finish("failed" if error is None or isinstance(error, Exception) else "killed")
            return
        files = {name: local_file(path) for name, path in record.files.items() if name in ARTEFACTS}
        self.tracker.log_metrics(figures(record))
        if "solver_log" in files:
            for step, event in enumerate(solver_steps(files["solver_log"])):
                self.tracker.log_metrics(event, step)
        for step, figures_of_step in enumerate(record.steps):
            if figures_of_step:
                self.tracker.log_metrics(figures_of_step, step)
        self.tracker.log_files(files)
        adapter = adapter_files(record.files)
        if record.manifest is not None and adapter:
            self.tracker.log_adapter(adapter, record.manifest)
        self.tracker.finish("finished")


def adapter_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """The adapter's files on this machine: those of a run, in its peft folder and beside it, or those of a training."""
    found = {name: local_file(files[name]) for name in ADAPTER_FILES if name in files}
    if "peft" in files:
        folder = local_file(files["peft"])
        found |= {name: folder / name for name in ADAPTER_FILES if (folder / name).is_file()}
    if "modules" in files:
        found[ADAPTER_FILES[-1]] = local_file(files["modules"])
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Parameter]]:
    """Dotted names and plain values; lists and empty mappings as JSON, null left out.

    >>> dict(flat({"model": {"task": "causal-lm"}, "ranks": [1, 2], "unset": None}))
    {'model.task': 'causal-lm', 'ranks': '[1, 2]'}
    """
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, dict)):
            yield f"{prefix}{name}", json.dumps(value)
        elif value is not None:
            yield f"{prefix}{name}", value


def figures(record: RunRecord) -> dict[str, float]:
    """Every figure of a job that ended well, finite ones only."""
    found: dict[str, Any] = {f"seconds.{stage}": seconds for stage, seconds in record.seconds.items()}
    found |= record.metrics
    for name, measured in record.measured.items():
        if isinstance(measured, dict):
            found |= {f"check.{name}.{key}": value for key, value in measured.items()}
        else:
            found[f"check.{name}"] = measured
    manifest = record.manifest
    if manifest is not None:
        found |= {"score": manifest.score, "upper_bound": manifest.upper_bound, "gap": manifest.gap}
        found["adapted_layers"] = sum(row.method != "none" for row in manifest.allocations)
        for use in manifest.resources:
            found[f"use.{use.resource}.total"] = use.total
            if use.budget:
                found[f"use.{use.resource}.share"] = use.total / use.budget
    return {
        name: float(value) for name, value in found.items() if isinstance(value, (int, float)) and math.isfinite(value)
    }


def solver_steps(log: Path) -> list[dict[str, float]]:
    """Numbers of each line of the solver's log."""
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [
        {
            f"solver.{name}": float(value)
            for name, value in event.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        }
        for event in events
    ]
