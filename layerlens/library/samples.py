"""Takes a sample of the user's data, in any form: rows for a task, or batches."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from layerlens.data.hub import dataset_rows, with_encoded_media
from layerlens.exceptions import DataError
from layerlens.library.rows import is_pair, refuse_texts, rows_of_columns, rows_of_pairs, with_rows
from layerlens.library.untouched import loader_kept
from layerlens.tasks import Batch

TOKENS = "input_ids"
MOST_STREAMED = 4096
"""Rows that are read of a stream of rows, which may have no end."""
FEWEST_BATCHES = 8
"""Batches that a loss of whole batches is measured on, where there are so many."""
Wanted = Callable[[int | None, Any], int]


@dataclass(frozen=True)
class Taken:
    """The sample of the data.

    Args:
        rows: all rows, as mappings of column to value; None if the data comes as batches.
        batches: batches as the data loader or collator returns them.
        more: further batches, to fit a new head on; empty if the data has no more.
        n_samples: number of samples in the whole data; None if it is unknown.
        said: description of the data, for the user.
        notes: notes for the user.
    """

    said: str
    rows: list[dict[str, Any]] | None = None
    batches: list[Any] = field(default_factory=list)
    more: list[Any] = field(default_factory=list)
    n_samples: int | None = None
    notes: tuple[str, ...] = ()


def take(
    data: Any, *, wanted: Wanted, spare: int, batch_size: int, tokenizer: Any = None,
    collator: Callable[[list[Any]], Any] | None = None, seed: int = 0,
) -> Taken:  # fmt: skip
    """Take all rows, or as many batches as needed.

    Args:
        data: a data loader, list, tuple, iterator or generator of batches; a `datasets.Dataset`, a DataFrame (pandas or
            polars), an Arrow table, a list of rows or of pairs (text, target), or (texts, targets); a map-style data
            set of torch.
        wanted: (number of samples in the data, or None if unknown; first batch) -> number of samples to measure.
        spare: number of additional samples for a new head; 0 if there is no new head.
        batch_size: samples in a batch, if the data does not come in batches.
        tokenizer: pads samples that are tokenised already, if no collator is given.
        collator: function from a list of samples to a batch.
        seed: random seed for the choice of samples from a map-style data set.

    Raises:
        DataError: the data is empty, exhausted, or of an unknown kind.
    """
    kind = data.kind if isinstance(data, OfTrainer) else type(data).__name__
    data = with_rows(data)
    if type(data).__module__.partition(".")[0] == "datasets" and isinstance(data, Mapping):
        raise DataError(f"data: is a {kind} with the splits {', '.join(data)}; give one of them, such as data['train']")
    if isinstance(data, Mapping) or hasattr(data, "keys"):
        data = (
            [data] if any(isinstance(value, torch.Tensor) for value in dict(data).values()) else rows_of_columns(data)
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise DataError(
            f"data: must be a DataLoader, a datasets.Dataset, rows, a list of batches or a trainer, got {kind}"
        )
    notes: tuple[str, ...] = ()
    if _is_loader(data):
        # accelerate's loader counts itself as in use until its last batch; the one inside gives the same batches
        return _from_iterable(getattr(data, "base_dataloader", data), kind, wanted, spare)
    if isinstance(data, Iterator) or not hasattr(data, "__getitem__") or _length(data) is None:
        stream = iter(data)
        first = next(stream, None)
        if not isinstance(first, str) and not _is_row(first):
            again = _Peeked(first, stream) if isinstance(data, Iterator) and first is not None else data
            return _from_iterable(again, kind, wanted, spare)
        data, notes = _streamed(data, first, stream, kind)
    taken = _from_indexed(data, kind, wanted, spare, batch_size, tokenizer, collator, seed)
    return replace(taken, notes=(*taken.notes, *notes))


def _is_loader(data: Any) -> bool:
    return hasattr(data, "dataset") and hasattr(data, "batch_size") and hasattr(data, "__iter__")


class _Peeked(Iterator[Any]):
    """An iterator whose first item was looked at."""

    def __init__(self, first: Any, rest: Iterator[Any]) -> None:
        self.items = itertools.chain([first], rest)

    def __next__(self) -> Any:
        return next(self.items)


def _streamed(data: Any, first: Any, rest: Iterator[Any], kind: str) -> tuple[Any, tuple[str, ...]]:
    """The first rows or texts of a stream, and what to say of them."""
    rows = [first, *itertools.islice(rest, MOST_STREAMED - 1)]
    said = [f"data: LayerLens reads the first {len(rows):,} rows of a {kind}"] if len(rows) == MOST_STREAMED else []
    if isinstance(data, Iterator):
        said.append(f"data: a {kind} cannot be rewound: the {len(rows)} rows taken from it are lost for later use")
    if getattr(data, "features", None) is not None and hasattr(data, "cast_column"):
        from datasets import Dataset

        return Dataset.from_list(rows, features=data.features), tuple(said)
    return rows, tuple(said)


def _from_iterable(data: Any, kind: str, wanted: Wanted, spare: int) -> Taken:
    """From what gives batches one after the other."""
    total = _length(getattr(data, "dataset", None)) if getattr(data, "batch_size", None) else None
    once = isinstance(data, Iterator)
    with loader_kept(data) if _is_loader(data) else nullcontext():
        stream = iter(data)
        first = next(stream, None)
        if first is None:
            reason = "the iterator is exhausted; create a new one, or give a list" if once else "it has no batches"
            raise DataError(f"data: {reason}")
        if isinstance(first, str) or _is_row(first):
            raise DataError(f"data: this {kind} gives single rows, not batches; give them as a list, or a data set")
        batches, n, ended = _batches(itertools.chain([first], stream), wanted(total, first))
        more, _, _ = ([], 0, True) if ended or not spare else _batches(stream, spare)
    notes = []
    if once:
        notes.append(
            f"data: a {kind} cannot be rewound: the {len(batches) + len(more)} batches taken from it are lost for "
            "later use"
        )
    of = "" if total is None else f" of {total}"
    count = "1 batch" if len(batches) == 1 else f"{len(batches)} batches"
    return Taken(f"{n}{of} samples in {count} of a {kind}", None, batches, more, total, tuple(notes))


def _from_indexed(
    data: Any, kind: str, wanted: Wanted, spare: int, batch_size: int, tokenizer: Any,
    collator: Callable[[list[Any]], Any] | None, seed: int,
) -> Taken:  # fmt: skip
    """From samples with numbers, or a list of batches."""
    total = _length(data)
    if not total:
        raise DataError(f"data: this {kind} has no samples")
    if collator is None and hasattr(data, "features") and hasattr(data, "cast_column"):
        data = with_encoded_media(data)
    first = data[0]
    if collator is None and isinstance(first, str):
        data = [{"text": text} for text in data]
        first = data[0]
    if collator is None and is_pair(first):
        data = rows_of_pairs(data)
        first = data[0]
    if collator is None:
        refuse_texts(first)
    if collator is None and not _is_row(first) and isinstance(data, (list, tuple)):  # of batches
        return _from_iterable(_Listed(data), kind, wanted, spare)
    if collator is None and _is_row(first):
        if TOKENS not in first:
            return Taken(f"{total} rows of a {kind}", rows=rows_of(data), n_samples=total)
        collator = padding_collator(tokenizer, first)
    order = random.Random(seed).sample(range(total), total)
    collate = collator or torch.utils.data.default_collate
    n = min(total, wanted(total, _collated(data, order[:batch_size], batch_size, collate)[0]))
    batches = _collated(data, order[:n], batch_size, collate)
    more = _collated(data, order[n : n + spare], batch_size, collate)
    return Taken(f"{n} of {total} samples of a {kind}", None, batches, more, total)


@dataclass(frozen=True)
class OfTrainer:
    """The batches of a trainer, with the interface of a data loader.

    Args:
        batches: batches of the trainer.
        dataset: the trainer's data set.
        batch_size: samples in a batch.
        kind: name of the trainer's class.
    """

    batches: Sequence[Any]
    dataset: Any
    batch_size: int
    kind: str

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Listed:
    """A list of batches with the interface of a data loader."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def rows_of(data: Any) -> list[dict[str, Any]]:
    """All rows. If the data set knows the names of its classes, the names replace the numbers."""
    if hasattr(data, "features") and hasattr(data, "cast_column"):
        return dataset_rows(data)
    return [{name: _plain(value) for name, value in row.items()} for row in data]


def _plain(value: Any) -> Any:
    """A number of NumPy as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def padding_collator(tokenizer: Any, first: Mapping[str, Any]) -> Callable[[list[Any]], Any]:
    """The collator with which the trainer of transformers pads such samples; without a tokenizer, one that stacks."""
    if tokenizer is None:
        return _stacked
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithPadding

    target = first.get("labels", first.get("label"))
    if target is None:
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)
    padded = isinstance(target, (list, tuple)) or getattr(target, "ndim", 0) == 1
    collate = DataCollatorForSeq2Seq(tokenizer) if padded else DataCollatorWithPadding(tokenizer)
    return lambda samples: collate([_numbers(sample) for sample in samples])


def _stacked(samples: list[Any]) -> dict[str, torch.Tensor]:
    """A batch of tokenised samples of one length, which need no padding."""
    rows = [{name: torch.as_tensor(value) for name, value in _numbers(sample).items()} for sample in samples]
    if len({tuple(row[TOKENS].shape) for row in rows}) > 1:
        raise DataError(
            "data: the samples are already tokens, of different lengths; give tokenizer= (to pad them) or collator="
        )
    batch: dict[str, torch.Tensor] = torch.utils.data.default_collate(rows)
    if not {"labels", "label"} & set(batch):
        batch["labels"] = batch[TOKENS].clone()  # as the collator of transformers does
    return batch


def _numbers(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample without its texts, which no collator makes a tensor of."""
    texts = (str, bytes)
    return {
        name: value
        for name, value in sample.items()
        if value is not None and not isinstance(value, texts)
        and not (isinstance(value, (list, tuple)) and value and isinstance(value[0], texts))
    }  # fmt: skip


def _is_row(sample: Any) -> bool:
    """Whether this is one sample by columns, and not a batch."""
    return isinstance(sample, Mapping) and not any(isinstance(value, torch.Tensor) for value in sample.values())


def _batches(stream: Iterable[Any], wanted: int) -> tuple[list[Any], int, bool]:
    """Batches with at least ``wanted`` samples together, how many, and whether there are no more."""
    found: list[Any] = []
    n = 0
    for batch in stream:
        found.append(batch)
        n += size_of(batch)
        if n >= wanted:
            return found, n, False
    return found, n, True


def size_of(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor, or the rows that a trainer made it of."""
    if rows := getattr(batch, "rows", ()):
        return len(rows)
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else 1
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (list, tuple)) else ()
    return next((size_of(value) for value in values if isinstance(value, (torch.Tensor, Mapping, list, tuple))), 1)


def _collated(data: Any, indices: list[int], batch_size: int, collate: Callable[[list[Any]], Any]) -> list[Any]:
    parts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    try:
        return [collate([data[index] for index in part]) for part in parts]
    except DataError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"data: its samples do not make a batch ({type(error).__name__}: {error}); give collator="
        ) from error


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def digest_of(batches: Sequence[Batch]) -> str:
    """SHA-256 over the inputs and targets of batches."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in value:
                digest.update(f"{name}=".encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    for batch in batches:
        add(batch.inputs)
        add(batch.labels)
    return digest.hexdigest()
