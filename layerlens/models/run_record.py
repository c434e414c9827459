"""What observers of a job are told when it ends: telemetry and experiment trackers read this, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerlens.models.manifest import Manifest


@dataclass(frozen=True)
class RunRecord:
    """A job that ended well.

    Args:
        kind: "run", "optimize", "train", "evaluate".
        manifest: what was chosen; None for jobs that choose nothing.
        files: what was written where, by name.
        seconds: wall time of each stage.
        measured: predicted against measured figures, by resource.
        metrics: other figures, by name.
        steps: figures of every step of a training, the first before it.
        statistics_from_cache: whether profiling was spared; None for jobs that do not profile.
    """

    kind: str
    manifest: Manifest | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: Sequence[Mapping[str, float]] = ()
    statistics_from_cache: bool | None = None
