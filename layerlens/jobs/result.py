"""What a finished run writes and hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerlens.models import LayerExplanation, Manifest

STATISTICS_FILE, REPORT_FILE, SOLVER_LOG_FILE = "statistics.safetensors", "report.html", "solver_log.jsonl"
CHOICE_FILES = (
    "manifest.json",
    "manifest.yaml",
    "peft",
    "layerlens_modules.safetensors",
    REPORT_FILE,
    SOLVER_LOG_FILE,
)
"""What belongs to one choice: whatever of it an earlier choice left behind would contradict the new one."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        manifest: what was written.
        directory: the output directory.
        files: what was written where: manifest_json, manifest_yaml, statistics, report, solver_log, and peft and
            modules where the manifest has layers for them.
        statistics_from_cache: the model was not profiled again.
        seconds: wall time of each stage.
        measured: predicted against measured figures (see ``pipeline.checks``).
        explanations: for each layer (or group that chooses alike) the runner-up and what would make it win.
        warnings: what the user should know, a line each.
    """

    manifest: Manifest
    directory: Path
    files: dict[str, Path]
    statistics_from_cache: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    explanations: tuple[LayerExplanation, ...] = ()
    warnings: tuple[str, ...] = ()
