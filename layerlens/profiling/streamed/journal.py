"""What an interrupted streamed profile has finished, written after every block."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from layerlens.exceptions import ActivationCacheError
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, cannot_write

FORMAT = "layerlens-stream-1"
STATE = "state.json"


class Journal:
    """The directory of one streamed profile: its state, the results of finished blocks, and the activations.

    Args:
        directory: only this process writes to it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state: dict[str, Any] = {"format": FORMAT, "forward": 0, "backward": 0}
        try:
            kept = json.loads((directory / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(kept, dict) and kept.get("format") == FORMAT:
            self.state = kept

    def fits(self, **facts: Any) -> bool:
        """Whether the state is of a profile with these facts; if not, it is begun anew."""
        wanted = json.loads(json.dumps(facts))
        if self.state.get("facts") == wanted:
            return True
        self.state = {"format": FORMAT, "forward": 0, "backward": 0, "facts": wanted}
        return False

    def write(self, **changes: Any) -> None:
        """Keep the state with these changes; what it speaks of is on the disk by now."""
        self.state |= changes
        atomic_write_text(self.directory / STATE, json.dumps(self.state))

    def keep_part(self, name: str, spec: ModelSpec, found: ModelStatistics) -> None:
        """Keep the statistics of one part of the model."""
        atomic_write_bytes(self._part(name), statistics_to_bytes(spec, found))

    def part(self, name: str) -> ModelStatistics | None:
        """The statistics of a part; None where they are missing or damaged."""
        try:
            return load_statistics(self._part(name), whole=False)[1]
        except ActivationCacheError:
            return None

    def keep_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep some tensors."""
        atomic_write_bytes(self._part(name), save({key: x.contiguous() for key, x in tensors.items()}))

    def tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """What ``keep_tensors`` kept; None where it is missing or damaged."""
        try:
            return {key: x.clone() for key, x in load_file(self._part(name)).items()}
        except (OSError, SafetensorError):
            return None

    def forget(self, name: str) -> None:
        """Remove some tensors."""
        self._part(name).unlink(missing_ok=True)

    def _part(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


@contextmanager
def stream_directory(kept: Path | None, parent: Path | None = None) -> Iterator[Path]:
    """A directory that this process alone writes to: ``kept`` (which stays after an error), or a temporary one.

    Temporary ones are made beside ``kept`` or in ``parent``, else where the system has its temporary files.

    A temporary one is taken also where another process streams the same profile at this time.

    Raises:
        OutputError: it cannot be made.
    """
    if kept is not None:
        try:
            kept.mkdir(parents=True, exist_ok=True)
            lock = os.open(kept / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise cannot_write(kept, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
        else:
            try:
                yield kept
                shutil.rmtree(kept, ignore_errors=True)
            finally:
                os.close(lock)
            return
    with tempfile.TemporaryDirectory(prefix="layerlens-stream-", dir=parent if kept is None else kept.parent) as name:
        yield Path(name)
