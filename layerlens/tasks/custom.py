"""Samples of the user's own data set, whatever they hold, and the user's own loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerlens.config import DataConfig
from layerlens.data.dataset import Dataset
from layerlens.data.table import Table
from layerlens.exceptions import ConfigurationError, DataError
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.torch_modules import precision_of
from layerlens.sources.factory import first_argument
from layerlens.tasks.batches import Features, Inputs
from layerlens.tasks.losses import own_loss
from layerlens.tasks.task import Task
from layerlens.utils.user_code import REFERENCE, load_function

if TYPE_CHECKING:
    import torch

OWN = "own_sample"
"""Under this name an encoded sample has the user's own, where ``data.collate`` makes the batches."""
Joined = Callable[[Sequence[Any]], Any]
PAD = "pad them in your own function and name it: data.collate: module:function, from a list of samples to a batch"
FUNCTIONS_ONLY = "data.source: the task custom takes module:function, which returns a data set or batches"


@dataclass(frozen=True)
class OwnSample:
    """One sample of the user's: (inputs, target), or a mapping with the target under ``labels``.

    Args:
        number: its place in the data set.
        source: the map-style data set.
        part: of a batch, which sample; None where the data set has single samples.
        join: the user's function that makes a batch of samples; None for ``default_collate``.
    """

    number: int
    source: Any = field(repr=False)
    part: int | None = None
    join: Joined | None = field(default=None, repr=False)

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

    def raw(self) -> Any:
        """The sample as the data set has it; of a batch as (inputs, target)."""
        return self.source[self.number] if self.part is None else self.read()


def load(config: DataConfig, base_dir: Path | None) -> Dataset:
    """The samples that the user's function gives: a map-style data set, or batches, which are cut into samples.

    Raises:
        DataError: the source is no function, or it returns something else.
    """
    if not REFERENCE.fullmatch(config.source) or config.source.startswith("builtin:"):
        raise DataError(FUNCTIONS_ONLY)
    join = None if config.collate is None else load_function(config.collate, "data.collate", base_dir)
    return own_dataset(load_function(config.source, "data.source", base_dir)(), config.source, join)


def read(table: Table, config: DataConfig) -> Dataset:
    """Rows say nothing about the inputs of a custom model."""
    raise DataError(FUNCTIONS_ONLY)


def own_dataset(value: Any, source: str, join: Joined | None = None) -> Dataset:
    """The samples of ``value``, what the function ``source`` returned, which ``join`` makes batches of.

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
        places = [(batch, part) for batch in range(len(value)) for part in range(_size(value, batch))]
        samples = [OwnSample(batch, value, part, join) for batch, part in places]
    else:
        samples = [OwnSample(number, value, join=join) for number in range(len(value))]
    if not samples:
        raise DataError(f"data.source: {source} returned no samples")
    return Dataset({"sample": tuple(samples)}, (None,) * len(samples), (), source)


def encode(pretrained: PretrainedModel, dataset: Dataset, config: DataConfig, seed: int) -> list[Features]:
    """Every sample's inputs as tensors by argument of the model, read once; the samples themselves where
    ``data.collate`` reads them batch by batch.
    """
    import torch

    if config.collate is not None:
        return [{OWN: sample, "labels": None} for sample in dataset.columns["sample"]]
    argument = first_argument(pretrained.model)
    found = []
    for number, sample in enumerate(dataset.columns["sample"]):
        inputs, labels = sample.read()
        named = dict(inputs) if isinstance(inputs, Mapping) else {argument: inputs}
        try:
            found.append({name: torch.as_tensor(value) for name, value in named.items()} | {"labels": labels})
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"data.source: sample {number} has an input that is not a tensor: {error}") from error
    return found


def collate(pretrained: PretrainedModel, rows: Sequence[Features]) -> tuple[Inputs, Any]:
    """A batch by ``data.collate``, else of inputs of one shape and targets that ``default_collate`` takes; inputs with
    a point are in the model's precision.

    Raises:
        DataError: shapes differ, or the user's function makes something else.
    """
    if OWN in rows[0]:
        inputs, labels = _joined(pretrained, [row[OWN] for row in rows])
    else:
        inputs, labels = _stacked(rows)
    dtype = precision_of(pretrained.model)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}, labels


def _stacked(rows: Sequence[Features]) -> tuple[Inputs, Any]:
    import torch
    from torch.utils.data import default_collate

    inputs = {}
    for name in rows[0]:
        shapes = {tuple(row[name].shape): None for row in rows} if name != "labels" else {}
        if len(shapes) > 1:
            one, other = list(shapes)[:2]
            raise DataError(
                f"data.source: samples in one batch have inputs {name!r} of the shapes {list(one)} and {list(other)}; "
                f"{PAD}"
            )
        if name != "labels":
            inputs[name] = torch.stack([row[name] for row in rows])
    try:
        return inputs, default_collate([row["labels"] for row in rows])
    except (RuntimeError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())[:160]
        raise DataError(f"data.source: the targets of a batch cannot be combined ({said}); {PAD}") from error


def _joined(pretrained: PretrainedModel, samples: Sequence[OwnSample]) -> tuple[Inputs, Any]:
    import torch

    function: Any = samples[0].join
    inputs, labels = _pair(function([sample.raw() for sample in samples]), "what data.collate made", key="data.collate")
    named = dict(inputs) if isinstance(inputs, Mapping) else {first_argument(pretrained.model): inputs}
    for name, value in (*named.items(), *_tensors(labels)):
        if name in named and not isinstance(value, torch.Tensor):
            raise DataError(f"data.collate: the input {name!r} must be a tensor, got {type(value).__name__}")
        if not value.dim() or len(value) != len(samples):
            raise DataError(
                f"data.collate: {name} must have the samples along the first axis ({len(samples)} of them), got the "
                f"shape {list(value.shape)}; pad samples of unequal length, and give their lengths as one more tensor"
            )
    return named, labels


def _tensors(value: Any, name: str = "targets") -> list[tuple[str, Any]]:
    """Every tensor of some targets, by the name that messages use."""
    if hasattr(value, "dim"):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [found for key, part in value.items() for found in _tensors(part, f"{name}[{key!r}]")]
    if isinstance(value, (tuple, list)):
        return [found for place, part in enumerate(value) for found in _tensors(part, f"{name}[{place}]")]
    return []


def _pair(value: Any, name: str, key: str = "data.source") -> tuple[Any, Any]:
    if isinstance(value, Mapping) and "labels" in value:
        return {key: part for key, part in value.items() if key != "labels"}, value["labels"]
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise DataError(
        f"{key}: {name} is a {type(value).__name__}; give (inputs, target), or a mapping of the model's "
        "arguments with the target under 'labels'"
    )


def _size(batches: list[Any], number: int) -> int:
    inputs, labels = _pair(batches[number], f"batch {number}")
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    if getattr(labels, "shape", None) == ():
        raise DataError(
            f"data.source: a list or iterator has batches (inputs, targets), and batch {number} has one target for "
            "all; return single samples as a torch.utils.data.Dataset, or wrap them in a DataLoader"
        )
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


def _no_loss(output: Any, labels: Any) -> torch.Tensor:
    raise ConfigurationError("model.loss: the task custom needs one; give module:function")


TASK = Task(
    name="custom",
    description="your own `loss` on your own data",
    inputs="sample",
    load=load,
    read=read,
    encode=encode,
    collate=collate,
    loss=own_loss(_no_loss, "model.loss"),
    model_targets=(),
)
