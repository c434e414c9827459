"""Activations between blocks, and what blocks are given beside them, in files that are mapped a batch at a time.

A window of a file is mapped only while one batch is copied to or from it: neither the address space nor the resident
memory grows with the number of batches.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from layerlens.exceptions import OutputError
from layerlens.utils.atomic import cannot_write

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


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE) * PAGE


def _gb(n_bytes: int) -> str:
    return f"{1e-9 * n_bytes:.3g} GB"
