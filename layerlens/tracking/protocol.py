"""The methods of an experiment tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from layerlens.models import Manifest

Parameter = str | int | float | bool
Status = Literal["finished", "failed", "killed"]


class Tracker(Protocol):
    """One run in one tracker. A factory that takes the ``TrackingConfig`` creates it.

    A package registers its factory under the entry point group ``layerlens.trackers``.
    """

    def start(self, kind: str, parameters: Mapping[str, Parameter]) -> None:
        """Open the run.

        Args:
            kind: kind of the job: "run", "optimize", "train" ...
            parameters: settings of the job by dotted key, such as ``optimization.max_trainable_params``.

        Raises:
            TrackingError: the tracker cannot be reached. The job then ends before it starts to work.
        """

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log figures by name at one step."""

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Store files as artefacts, by name."""

    def log_adapter(self, files: Mapping[str, Path], manifest: Manifest) -> None:
        """Store the adapter as a model.

        Args:
            files: its files, by the names that ``layerlens.tuning.load`` expects in a directory.
            manifest: the choice that the adapter belongs to.
        """

    def finish(self, status: Status) -> None:
        """Close the run with this status."""
