"""What a streamed profile keeps on the disk: activations between blocks, what blocks are given beside them, results.

The journal of finished blocks is written after every one. Activations are in files that are mapped a batch at a time.
A window is mapped only while one batch is copied to or from it: neither the address space nor the resident
memory grows with the number of batches.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.utils._pytree import tree_map

from layerlens.exceptions import ActivationCacheError, OutputError
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.profiling.statistics_file import load_statistics, statistics_to_bytes
from layerlens.utils.atomic import atomic_write_bytes, atomic_write_text, cannot_write

FORMAT = "layerlens-stream-1"
STATE = "state.json"
PAGE = 4096
"""Windows begin at multiples of it, as the system asks of a map."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where it begins, and what it is."""

    offset: int
    shape: tuple[int, ...]
    expanded: tuple[int, ...]
    dtype: torch.dtype


class TensorFile:
    """Tensors one after the other in one file, each beginning at a page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        path.touch()

    def append(self, tensor: torch.Tensor) -> Stored:
        """Write a tensor at the end; dimensions that are only expanded are stored once."""
        once = tensor.detach()[tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())]
        stored = Stored(self.end, tuple(once.shape), tuple(tensor.shape), tensor.dtype)
        self.write(stored, once)
        self.end += _pages(once.numel() * once.element_size())
        return stored

    def write(self, stored: Stored, tensor: torch.Tensor) -> None:
        """Write a tensor where ``stored`` says.

        Raises:
            OutputError: the disk is full.
        """
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if not len(flat):
            return
        if os.stat(self.path).st_size < stored.offset + len(flat):
            self.reserve(stored.offset + len(flat))
        window = np.memmap(self.path, np.uint8, "r+", offset=stored.offset, shape=flat.shape)
        window[:] = flat

    def read(self, stored: Stored, device: torch.device) -> torch.Tensor:
        """A copy of a tensor, in memory that torch allocated: sums may depend on how memory is aligned."""
        found = torch.empty(stored.shape, dtype=stored.dtype)
        if found.numel():
            flat = found.view(-1).view(torch.uint8).numpy()
            flat[:] = np.memmap(self.path, np.uint8, "r", offset=stored.offset, shape=flat.shape)
        return found.expand(stored.expanded).to(device)

    def reserve(self, n_bytes: int) -> None:
        """Give the file at least this size on the disk: a map of a file that cannot grow ends the process.

        Raises:
            OutputError: the disk has not so much.
        """
        with self.path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise cannot_write(self.path, error) from error
                os.ftruncate(file.fileno(), max(n_bytes, os.stat(self.path).st_size))

    def sync(self) -> None:
        """Have everything on the disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())


class Boundaries:
    """Activations [b, t, features] of every batch before every block, and after the last; gradients in two more places.

    Slot s < n_blocks + 1 has the activations that block s is given. The first slot is filled by ``append``; its sizes
    are those of all others.
    """

    def __init__(self, path: Path, n_blocks: int, device: torch.device) -> None:
        self.file = TensorFile(path)
        self.n_slots = n_blocks + 3
        self.device = device
        self.first: list[Stored] = []

    @property
    def slot_bytes(self) -> int:
        """One slot."""
        return self.file.end

    @property
    def total_bytes(self) -> int:
        """All slots."""
        return self.n_slots * self.slot_bytes

    def append(self, hidden: torch.Tensor) -> None:
        """What the first block is given, of one more batch."""
        self.first.append(self.file.append(hidden.contiguous()))

    def make_room(self) -> None:
        """Take the space of all slots on the disk.

        Raises:
            OutputError: the disk has less.
        """
        have = os.stat(self.file.path).st_blocks * 512  # an earlier, interrupted profile's
        free = shutil.disk_usage(self.file.path.parent).free
        if self.total_bytes - have > free:
            raise OutputError(
                f"streaming keeps {_gb(self.total_bytes)} of activations at block boundaries in "
                f"{self.file.path.parent}, where {_gb(free)} are free; free some space, choose another disk by "
                "runtime.cache_dir, or lower data.calibration_samples or data.max_length"
            )
        self.file.reserve(self.total_bytes)

    def write(self, slot: int, batch: int, hidden: torch.Tensor) -> None:
        """Keep the activations, or gradients, of a batch."""
        self.file.write(self._place(slot, batch), hidden)

    def read(self, slot: int, batch: int) -> torch.Tensor:
        """A copy of them on the device."""
        return self.file.read(self._place(slot, batch), self.device)

    def gradient_slot(self, number: int) -> int:
        """Where the gradients at the boundary before block ``number`` are: those of its neighbours are in the other."""
        return self.n_slots - 2 + number % 2

    def _place(self, slot: int, batch: int) -> Stored:
        first = self.first[batch]
        return Stored(first.offset + slot * self.slot_bytes, first.shape, first.expanded, first.dtype)


class TreeFile:
    """Nested lists, tuples and dicts of tensors, the tensors in a file; one that occurs twice is there once."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.file = TensorFile(path)
        self.device = device

    def append(self, tree: Any) -> Any:
        """The tree with its tensors replaced by where they are."""
        done: dict[int, tuple[torch.Tensor, Stored]] = {}

        def keep(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) not in done:  # the tensor is held, so that no other gets its address
                done[id(leaf)] = leaf, self.file.append(leaf)
            return done[id(leaf)][1]

        return tree_map(keep, tree)

    def read(self, tree: Any) -> Any:
        """The tree with its tensors."""
        return tree_map(lambda leaf: self.file.read(leaf, self.device) if isinstance(leaf, Stored) else leaf, tree)


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
        except (OSError, ValueError, RecursionError):
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


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE) * PAGE


def _gb(n_bytes: int) -> str:
    return f"{1e-9 * n_bytes:.3g} GB"
