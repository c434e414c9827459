"""Weights & Biases: figures and solver steps as charts, manifest and report as an artefact, the adapter as a model.

``WANDB_MODE`` (``offline``, ``disabled``), ``WANDB_API_KEY``, ``WANDB_ENTITY`` and ``WANDB_BASE_URL`` are read by wandb
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from layerlens.config import TrackingConfig
from layerlens.exceptions import TrackingError
from layerlens.models import Manifest
from layerlens.storage.filesystem import redacted
from layerlens.tracking.protocol import Parameter, Status

EXIT_CODES = {"finished": 0, "failed": 1, "killed": 255}
"""By which W&B tells how a run ended."""
AXES = {"solver": "solver/step", "train": "train/global_step", "eval": "train/global_step"}
"""The x axis of each group of figures that has steps; that of a training as transformers' callback names it."""
INIT_SECONDS = 30.0


class WandbTracker:
    """One run of W&B's, in the project ``tracking.experiment``."""

    def __init__(self, config: TrackingConfig) -> None:
        self.config = config
        self.run: Any = None

    def start(self, kind: str, parameters: Mapping[str, Parameter]) -> None:
        """Open the run; where the program has one of its own open, that one stays as it is."""
        folder = Path(self.config.log_dir).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(
                project=self.config.experiment,
                name=self.config.run_name,
                job_type=kind,
                config=dict(parameters),
                tags=[f"{name}:{value}"[:64] for name, value in self.config.tags.items()] or None,
                dir=str(folder),
                reinit="default" if wandb.run is None else "create_new",
                # What the terminal shows, the code and the state of its repository are nobody's business.
                settings=wandb.Settings(console="off", disable_git=True, save_code=False, init_timeout=INIT_SECONDS),
            )
            for group, axis in AXES.items():
                self.run.define_metric(f"{group}/*", step_metric=axis)
        except (wandb.Error, OSError) as error:
            reason = redacted(" ".join(str(error).split()))[:300]
            raise TrackingError(
                f"tracking.trackers: wandb cannot be used ({reason}); log in with `wandb login`, set "
                "WANDB_MODE=offline, or remove wandb from tracking.trackers"
            ) from error

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a step of their own group: the solver and a training count apart."""
        groups = {name.partition(".")[0] for name in metrics}
        shown: dict[str, float] = {name.replace(".", "/", 1): value for name, value in metrics.items()}
        self.run.log(shown | {axis: step for group, axis in AXES.items() if group in groups})

    def log_files(self, files: Mapping[str, Path]) -> None:
        """All files as one artefact."""
        self._log_artifact(f"files-{self.run.id}", "layerlens-files", {path.name: path for path in files.values()})

    def log_adapter(self, files: Mapping[str, Path], manifest: Manifest) -> None:
        """The adapter as a model; under ``tracking.register_model`` it is a version of that one."""
        facts = {
            "base_model": manifest.model.name_or_path, "task": manifest.model.task, "score": manifest.score,
            "gap": manifest.gap, "trainable_params": manifest.trainable_params,
        }  # fmt: skip
        self._log_artifact(self.config.register_model or f"adapter-{self.run.id}", "model", files, facts)

    def _log_artifact(
        self, name: str, kind: str, files: Mapping[str, Path], facts: Mapping[str, Any] | None = None
    ) -> None:
        artifact = wandb.Artifact(name, type=kind, metadata=dict(facts or {}))
        for inside, path in files.items():
            artifact.add_file(str(path), name=inside)
        self.run.log_artifact(artifact)

    def finish(self, status: Status) -> None:
        """Send what is left, and close the run."""
        self.run.finish(exit_code=EXIT_CODES[status])
