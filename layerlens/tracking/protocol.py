"""The methods that an experiment tracker must have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from layerlens.models import Manifest

Parameter = str | int | float | bool
Status = Literal["finished", "failed", "killed"]


class Tracker(Protocol):
    """One run of one tracker; made by a factory that takes the TrackingConfig.

    A package registers its factory under the entry point group ``layerlens.trackers``.
    """

    def start(self, kind: str, parameters: Mapping[str, Parameter]) -> None:
        """Open the run.

        Raises:
            TrackingError: the tracker cannot be reached; the job is then refused before it has done anything.
        """

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a step."""

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Files by name, kept as artefacts."""

    def log_adapter(self, files: Mapping[str, Path], manifest: Manifest) -> None:
        """An adapter, kept as a model: files by the names under which ``layerlens.tuning.load`` reads one directory."""

    def finish(self, status: Status) -> None:
        """Close the run."""
