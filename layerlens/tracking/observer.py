"""Translates what a job reports into calls of a tracker."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from layerlens.config import TrackingConfig
from layerlens.exceptions import ConfigurationError
from layerlens.models.manifest import RunRecord
from layerlens.storage import local_file
from layerlens.tracking.protocol import Parameter, Tracker
from layerlens.utils.observer import Observer, RunObserver

ENTRY_POINTS = "layerlens.trackers"
OWN = {
    "mlflow": ("tracking", "MlflowTracker"),
    "tensorboard": ("tracking", "TensorboardTracker"),
    "wandb": ("wandb", "WandbTracker"),
}
"""Name of a tracker -> the extra that installs what it needs, and its class in the module of its name."""
SHARED = ("wandb",)
"""Those whose open run is the one that transformers' callback of the same name goes on with (training.report_to)."""
ARTEFACTS = ("manifest_json", "manifest_yaml", "report", "solver_log", "metrics", "runs")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "layerlens_modules.safetensors")
"""What ``layerlens.tuning.load`` reads."""


def tracking_observers(config: TrackingConfig) -> list[RunObserver]:
    """One observer for each tracker that the configuration names.

    Raises:
        ConfigurationError: no such tracker, or its package is not installed.
    """
    return [TrackingObserver(_factory(name)(config), name) for name in config.trackers]


def _factory(name: str) -> Callable[[TrackingConfig], Tracker]:
    found = {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}
    if name not in (*OWN, *found):
        known = ", ".join([*OWN, *sorted(found)])
        raise ConfigurationError(f"tracking.trackers: unknown tracker {name!r}; known: {known}")
    if name not in OWN:
        loaded: Callable[[TrackingConfig], Tracker] = found[name].load()
        return loaded
    extra, kind = OWN[name]
    try:
        module = import_module(f"layerlens.tracking.{name}_tracker")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"tracking.trackers: {name} is not installed; run: pip install 'layerlens[{extra}]'"
        ) from error
    factory: Callable[[TrackingConfig], Tracker] = getattr(module, kind)
    return factory


class TrackingObserver(Observer):
    """Tells one tracker, known by its name, of one job."""

    def __init__(self, tracker: Tracker, name: str = "") -> None:
        self.tracker, self.name = tracker, name
        self.live = False
        """transformers' callback of this name writes the training's steps into the same run, while it goes on."""

    def run_started(self, kind: str, config: Any) -> None:
        """Open the run with the job's parameters."""
        self.live = self.name in SHARED and self.name in config.training.report_to
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
            if figures_of_step and not self.live:
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
