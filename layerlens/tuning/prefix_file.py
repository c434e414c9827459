"""Activations of samples on disk, each found by what the model was given of its sample.

A key is a digest of all inputs of a sample without their padding. Whatever order samples come in, and whatever they
are batched with, a sample is found by its content; one whose inputs are drawn anew in every epoch is never found, so
nothing of another draw is taken for it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens.utils.atomic import atomic_write_bytes

DATA_FILE, INDEX_FILE = "activations.bin", "index.npz"
KEY_BYTES = 16
MASK = "attention_mask"
COUNTS = ("num_items_in_batch",)
"""What trainers tell a model of the whole step; no input of a sample."""


class PrefixRefused(Exception):
    """Why activations cannot be stored or used, in words that continue from "cannot be stored: "."""


@dataclass(frozen=True)
class Given:
    """What a model was given in one forward pass.

    Args:
        keys: a digest for each sample.
        mask: bool [samples, tokens], the tokens that are no padding; None where nothing is padded.
    """

    keys: tuple[bytes, ...]
    mask: torch.Tensor | None

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
        """The keys of a forward pass with these arguments.

        Raises:
            PrefixRefused: an input is not one row for each sample.
        """
        named = {**{f"argument {place}": value for place, value in enumerate(args)}, **kwargs}
        named = {name: value for name, value in named.items() if value is not None and name not in COUNTS}
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.dim()}
        if not tensors:
            raise PrefixRefused("the model gets no tensors")
        count = len(tensors.get("input_ids", next(iter(tensors.values()))))
        mask = tensors.get(MASK)
        mask = mask.bool().cpu() if mask is not None and mask.dim() == 2 else None
        shared = hashlib.blake2b(digest_size=KEY_BYTES)
        digests = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in range(count)]
        for name, value in sorted(named.items()):
            shared.update(name.encode())
            if name not in tensors:
                if not isinstance(value, str | int | float | bool | torch.Tensor):
                    raise PrefixRefused(
                        f"the input {name} is a {type(value).__name__}, which does not have one row per sample"
                    )
                shared.update(repr(value.item() if isinstance(value, torch.Tensor) else value).encode())
                continue
            tensor = tensors[name].detach().cpu().contiguous()
            if len(tensor) != count:
                raise PrefixRefused(f"the input {name} has {len(tensor)} rows for {count} samples")
            of_tokens = mask is not None and tensor.shape[:2] == mask.shape
            for row, digest in enumerate(digests):
                own = tensor[row][mask[row]] if of_tokens and mask is not None else tensor[row]
                digest.update(name.encode() + repr(tuple(own.shape)).encode())
                digest.update(_bytes_of(own))
        end = shared.digest()
        for digest in digests:
            digest.update(end)
        return cls(tuple(digest.digest() for digest in digests), mask)

    def rows(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """What each sample has of activations [samples, ...], without padding.

        Raises:
            PrefixRefused: they are not one row for each sample.
        """
        if hidden.dim() < 2 or len(hidden) != len(self.keys):
            raise PrefixRefused(f"a block passes on {len(hidden)} rows for {len(self.keys)} samples")
        if self.mask is None or hidden.shape[:2] != self.mask.shape:
            return list(hidden)
        return [row[own.to(row.device)] for row, own in zip(hidden, self.mask, strict=True)]

    def together(self, rows: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The opposite of ``rows``: zeros where there is padding; None where the rows do not fit this batch."""
        counts = {len(row) for row in rows}
        if self.mask is not None and [len(row) for row in rows] == self.mask.sum(dim=1).tolist():
            hidden = rows[0].new_zeros((*self.mask.shape, *rows[0].shape[1:]))
            hidden[self.mask] = torch.cat(list(rows))
            return hidden
        return torch.stack(list(rows)) if len(counts) == 1 else None


class PrefixFile:
    """The file; an index of what is in it is saved beside it.

    Args:
        directory: belongs to it.
        dtype: what is stored; that of the activations when None.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        self.directory, self.dtype = directory, dtype
        self.places: dict[bytes, tuple[int, int]] = {}
        self.tail: tuple[int, ...] | None = None
        self.kept_as: torch.dtype | None = None
        self.end = self.batches = 0
        self._map = np.zeros(0, dtype=np.uint8)

    @property
    def path(self) -> Path:
        return self.directory / DATA_FILE

    def load(self) -> None:
        """Go on from what ``save_index`` last wrote; what came after it in the file is written anew."""
        try:
            with np.load(self.directory / INDEX_FILE) as index:
                keys, places, tail = index["keys"], index["places"], tuple(index["tail"].tolist())
                end, batches, name = int(index["end"]), int(index["batches"]), str(index["dtype"])
            if self.path.stat().st_size < end:
                return
        except (OSError, ValueError, KeyError):
            return  # nothing, or something damaged: as if nothing had been stored
        os.truncate(self.path, end)
        self.places = {key.tobytes(): (int(at), int(n)) for key, (at, n) in zip(keys, places, strict=True)}
        self.tail, self.end, self.batches, self.kept_as = tail, end, batches, getattr(torch, name)

    def save_index(self) -> None:
        """Make sure that what is stored so far is found by ``load``."""
        import io

        if self.kept_as is None:
            return
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        stream = io.BytesIO()
        np.savez(
            stream,
            keys=np.frombuffer(b"".join(self.places), dtype=np.uint8).reshape(-1, KEY_BYTES),
            places=np.array(list(self.places.values()), dtype=np.int64).reshape(-1, 2),
            tail=np.array(self.tail, dtype=np.int64),
            end=self.end,
            batches=self.batches,
            dtype=str(self.kept_as).removeprefix("torch."),
        )
        atomic_write_bytes(self.directory / INDEX_FILE, stream.getvalue())

    def add(self, given: Given, hidden: torch.Tensor) -> None:
        """Store the rows of a batch that are not there yet.

        Raises:
            PrefixRefused: activations of another shape than those before.
            OSError: they cannot be written.
        """
        self.batches += 1
        new: dict[bytes, torch.Tensor] = {}
        for key, row in zip(given.keys, given.rows(hidden), strict=True):
            if key not in self.places:
                new.setdefault(key, row)
        if not new:
            return
        kept = self.dtype or hidden.dtype
        tail = next(iter(new.values())).shape[1:]
        if self.kept_as not in (None, kept) or self.tail not in (None, tuple(tail)):
            raise PrefixRefused(f"activations are {kept} {tuple(tail)} and were {self.kept_as} {self.tail}")
        self.kept_as, self.tail = kept, tuple(tail)
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab" if self.end else "wb") as file:
            for key, row in new.items():
                data = _bytes_of(row.detach().to(kept).cpu().contiguous())
                file.write(data)
                self.places[key] = (self.end, len(row))
                self.end += len(data)

    def find(self, given: Given) -> torch.Tensor | None:
        """The activations of a batch, in the precision that they are kept in; None where a sample's are not there."""
        places = [self.places.get(key) for key in given.keys]
        if self.kept_as is None or self.tail is None or not all(places):
            return None
        if len(self._map) < self.end:
            self._map = np.memmap(self.path, dtype=np.uint8, mode="r")
        rows, size = [], int(np.prod(self.tail)) * self.kept_as.itemsize
        for place in places:
            assert place is not None
            start, n = place
            data = torch.from_numpy(np.array(self._map[start : start + n * size]))
            rows.append(data.view(self.kept_as).reshape(n, *self.tail))
        return given.together(rows)

    def remove(self) -> None:
        """Free the disk."""
        self._map = np.zeros(0, dtype=np.uint8)
        shutil.rmtree(self.directory, ignore_errors=True)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
