"""Samples that a function of the user gives: a map-style data set, or batches, which are cut into samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerlens.data.dataset import Dataset
from layerlens.exceptions import DataError


@dataclass(frozen=True)
class OwnSample:
    """One sample of the user's: (inputs, target), or a mapping with the target under ``labels``.

    Args:
        number: its place in the data set.
        source: the map-style data set.
        part: of a batch, which sample; None where the data set has single samples.
    """

    number: int
    source: Any = field(repr=False)
    part: int | None = None

    @property
    def identity(self) -> str:
        """Its place: what it holds may be drawn or augmented."""
        return str(self.number) if self.part is None else f"{self.number}.{self.part}"

    def content(self) -> bytes:
        """A digest of its tensors, arrays and numbers."""
        inputs, labels = self.read()
        digest = hashlib.sha256()
        _update(digest, inputs)
        _update(digest, labels)
        return digest.digest()

    def read(self) -> tuple[Any, Any]:
        """(inputs, target), without a batch axis.

        Raises:
            DataError: it is neither a pair nor a mapping with ``labels``.
        """
        inputs, labels = _pair(self.source[self.number], f"sample {self.number}")
        return (inputs, labels) if self.part is None else (_row(inputs, self.part), _row(labels, self.part))


def own_dataset(value: Any, source: str) -> Dataset:
    """The samples of ``value``, what the function ``source`` returned.

    Raises:
        DataError: it is neither a map-style data set (``__len__`` and ``__getitem__``) of samples nor an iterable of
            batches, or it has none.
    """
    batched = not hasattr(value, "__getitem__") or isinstance(value, (list, tuple))
    if batched and not isinstance(value, Iterable):
        raise DataError(
            f"data.source: {source} returned {type(value).__name__}; return a map-style data set (with __len__ and "
            "__getitem__), or batches: (inputs, targets) pairs whose tensors have the samples along their first axis"
        )
    if batched:
        value = list(value)
        samples = [OwnSample(batch, value, part) for batch in range(len(value)) for part in range(_size(value, batch))]
    else:
        samples = [OwnSample(number, value) for number in range(len(value))]
    if not samples:
        raise DataError(f"data.source: {source} returned no samples")
    return Dataset({"sample": tuple(samples)}, (None,) * len(samples), (), source)


def _pair(value: Any, name: str) -> tuple[Any, Any]:
    if isinstance(value, Mapping) and "labels" in value:
        return {key: part for key, part in value.items() if key != "labels"}, value["labels"]
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise DataError(
        f"data.source: {name} is a {type(value).__name__}; give (inputs, target), or a mapping of the model's "
        "arguments with the target under 'labels'"
    )


def _size(batches: list[Any], number: int) -> int:
    inputs, _ = _pair(batches[number], f"batch {number}")
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return len(first)


def _row(value: Any, row: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _row(part, row) for key, part in value.items()}
    return value[row]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in value:
            digest.update(f"{key}=".encode())
            _update(digest, value[key])
    elif hasattr(value, "numpy"):
        array = value.detach().cpu().float().numpy() if value.is_floating_point() else value.cpu().numpy()
        digest.update(f"{value.dtype}{array.shape}".encode() + array.tobytes())
    else:
        digest.update(repr(value).encode())
