"""TensorBoard event files: figures as scalars, parameters as hyperparameters, the plan as text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from layerlens.config import TrackingConfig
from layerlens.exceptions import TrackingError
from layerlens.models import Manifest
from layerlens.tracking.protocol import Parameter, Status


class TensorboardTracker:
    """One run in a folder of its own below ``tracking.log_dir``."""

    def __init__(self, config: TrackingConfig) -> None:
        name = config.run_name or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self.directory = Path(config.log_dir).expanduser() / config.experiment / name
        self.tags = config.tags
        self.parameters: dict[str, Parameter] = {}
        self.writer: SummaryWriter | None = None

    def start(self, kind: str, parameters: Mapping[str, Parameter]) -> None:
        """Open the event file."""
        try:
            self.writer = SummaryWriter(str(self.directory))
        except OSError as error:
            raise TrackingError(
                f"tracking.log_dir: cannot write {self.directory}: {error.strerror or error}; choose a directory that "
                "you can write to"
            ) from error
        self.parameters = {"kind": kind, **parameters}
        for name, value in self.tags.items():
            self.writer.add_text(f"tag/{name}", value)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Scalars at a step."""
        assert self.writer is not None
        for name, value in metrics.items():
            self.writer.add_scalar(name.replace(".", "/", 1), value, step)
        if step == 0 and "score" in metrics:
            found = {f"hparam/{name}": metrics[name] for name in ("score", "gap")}
            self.writer.add_hparams(self.parameters, found, run_name=".")

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Where each file is, and the manifest as text; TensorBoard keeps no files."""
        assert self.writer is not None
        listed = "\n".join(f"- {name}: `{path}`" for name, path in files.items())
        self.writer.add_text("files", listed)
        if "manifest_yaml" in files:
            text = files["manifest_yaml"].read_text(encoding="utf-8")
            self.writer.add_text("manifest", "    " + text.replace("\n", "\n    "))

    def log_adapter(self, files: Mapping[str, Path], manifest: Manifest) -> None:
        """Where the adapter is, and which layers it has."""
        assert self.writer is not None
        rows = [f"| {row.layer} | {row.method} | {row.rank} |" for row in manifest.allocations if row.method != "none"]
        table = "\n".join(["| layer | method | rank |", "|---|---|---|", *rows])
        places = "\n".join(f"- `{path}`" for path in files.values())
        self.writer.add_text("adapter", f"{places}\n\n{table}")

    def finish(self, status: Status) -> None:
        """Write out everything."""
        assert self.writer is not None
        self.writer.add_text("status", status)
        self.writer.close()
