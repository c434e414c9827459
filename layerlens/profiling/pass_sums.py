"""What a pass has added up so far: the sums of every matrix and input, and the numbers of every batch apart.

It is one value, by names that follow from the declared sums: kept in a file and taken up again (``saved_pass``), added
up over processes (``gathering``), read when all is there. Numbers of a batch (losses, per-sample norms, squares of
inputs) are taken off the accumulators after it and put back, added up from the first batch to the last, when all are
there. So their bits depend neither on which process measured which batch nor on when a pass was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from layerlens.models import LayerSpec, MethodStatistics
from layerlens.models.statistics import EXPERT_TOKENS
from layerlens.profiling.accumulators import InputAccumulator, LayerRows, MatrixAccumulator, SumShards
from layerlens.profiling.projections import Projection
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.sums import Shape
from layerlens.tasks import Batch

Key = tuple[str, str]
"""(layer, method), or (parameter, "weight") for weights outside the layers."""
Name = tuple[str, ...]
"""("matrix" or "inputs", layer, method, sum) of a total; of rows with (samples before the batch, part) after it, or
("layers", sum, samples before the batch)."""


@dataclass(frozen=True)
class Matrix:
    """One accumulator: its key, the (g, o, i) of its matrix, the key of its inputs, and whether they are indices."""

    key: Key
    shape: Shape
    source: Key
    looked_up: bool = False


@dataclass
class PassTensors:
    """The tensors of what some batches add up to.

    Args:
        inputs, matrices: which accumulators there are.
        totals: tensors that are added up; each on the device of its accumulator, and its own memory.
        rows: tensors of single samples.
        shards: over how many processes totals are spread; 1 where they are whole.
        unmeasured: layers and parameters that cannot be measured, with the reason.
    """

    inputs: list[Key] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    totals: dict[Name, torch.Tensor] = field(default_factory=dict)
    rows: dict[Name, torch.Tensor] = field(default_factory=dict)
    shards: int = 1
    unmeasured: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.totals.values(), *self.rows.values()))


class PassSums:
    """The accumulators of one pass, made as matrices are met.

    Args:
        request: what to find.
        threads: for the kernels.
        shards: where totals that can be are sharded over processes, as the model is.
    """

    def __init__(self, request: StatisticsRequest, threads: int, shards: SumShards | None = None) -> None:
        self.request = request
        self.threads = threads
        self.shards = shards
        self.accumulators: dict[Key, MatrixAccumulator] = {}
        self.inputs: dict[Key, InputAccumulator] = {}
        self.rows = LayerRows()
        self.unmeasured: dict[str, str] = {}

    @property
    def n_shards(self) -> int:
        """Over how many processes totals are spread."""
        return self.shards.processes.size if self.shards else 1

    def matrix(self, key: Key, shape: Shape, source: Key, looked_up: bool = False) -> MatrixAccumulator:
        """The sums of one matrix, whose layer's inputs are summed under ``source``.

        ``looked_up`` is whether the matrix is the weight of an Embedding that is a layer.
        """
        if key not in self.accumulators:
            inputs = self._inputs(source)
            projection = inputs.projection if shape[0] == 1 else None
            if projection is not None and projection.name != "|".join(key):  # the inputs are those of another layer
                projection = Projection("|".join(key))
            place = self.request.place(shape, key[1], projected=projection is not None, looked_up=looked_up)
            self.accumulators[key] = MatrixAccumulator(
                self.request.sums(place), place, self.threads, inputs, projection, self.rows, self.shards
            )
        return self.accumulators[key]

    def _inputs(self, source: Key) -> InputAccumulator:
        if source not in self.inputs:
            projection = None if source[1] == "weight" else Projection("|".join(source))
            self.inputs[source] = InputAccumulator(self.request.input_sums, self.threads, projection)
        return self.inputs[source]

    def result(self, key: Key) -> MethodStatistics:
        """The statistics of one matrix; None, or empty, what was not asked for."""
        matrix = self.accumulators[key]
        values: dict[str, Any] = {}
        for statistic in self.request.statistics:
            values |= statistic.named(statistic.result(matrix))
        matrix.forget()
        if matrix.inputs.tokens__g is not None:
            values[EXPERT_TOKENS] = matrix.inputs.tokens__g
        return MethodStatistics.of(values)

    def parts(self, layers: Iterable[LayerSpec]) -> dict[str, dict[Key, np.ndarray]]:
        """Statistic -> matrix -> what it has to say about a statistic of the model, in the order of the layers."""
        found: dict[str, dict[Key, np.ndarray]] = {}
        measured = [layer for layer in layers if layer.name not in self.unmeasured]
        keys = [(layer.name, method) for layer in measured for method in layer.methods]
        for statistic in self.request.statistics:
            if statistic.part is not None:
                parts = {key: statistic.part(self.accumulators[key]) for key in keys if key in self.accumulators}
                found[statistic.name] = {key: part for key, part in parts.items() if part is not None}
        return found

    def tensors(self) -> PassTensors:
        """The accumulators' own tensors, not copies."""
        found = PassTensors(inputs=list(self.inputs), shards=self.n_shards, unmeasured=dict(self.unmeasured))
        source_of = {id(inputs): key for key, inputs in self.inputs.items()}
        for key, one in self.accumulators.items():
            found.matrices.append(Matrix(key, one.place.shape, source_of[id(one.inputs)], one.place.looked_up))
            for name, kept in one.kept.items():
                for before, rows in kept.items():
                    found.rows |= {("matrix", *key, name, str(before), part): x for part, x in rows.items()}
        for kind, key, accumulator in self._all():
            found.totals |= {(kind, *key, name): total for name, total in accumulator.totals.items()}
        for name, done in self.rows.done.items():
            found.rows |= {("layers", name, str(before)): rows for before, rows in done.items()}
        return found

    def add_empty(self, inputs: Iterable[Key], matrices: Iterable[Matrix]) -> None:
        """Have these accumulators; a layer that some samples do not reach (experts) is not known everywhere."""
        for source in inputs:
            self._inputs(source)
        for matrix in matrices:
            self.matrix(matrix.key, matrix.shape, matrix.source, matrix.looked_up)

    def add_total(self, name: Name, tensor: torch.Tensor) -> None:
        """Add one of the totals, taking the tensor itself where there was none."""
        kind, layer, method, total = name
        totals = (self.inputs if kind == "inputs" else self.accumulators)[layer, method].totals
        totals[total] = totals[total].add_(tensor) if total in totals else tensor

    def add(self, other: PassTensors, device: torch.device) -> None:
        """Add another's totals and rows, copied to the device."""
        self.add_empty(other.inputs, other.matrices)
        self.unmeasured |= other.unmeasured
        for name, tensor in other.totals.items():
            # Copied to an address as torch allocates it: BLAS may sum in another order where memory is aligned
            # otherwise.
            self.add_total(name, tensor.clone().to(device))
        for name, tensor in other.rows.items():
            if name[0] == "layers":
                self.rows.done.setdefault(name[1], {})[int(name[2])] = tensor.clone().to(device)
            else:
                _, layer, method, one, before, part = name
                kept = self.accumulators[layer, method].kept.setdefault(one, {})
                kept.setdefault(int(before), {})[part] = tensor.clone()

    def take_numbers(self) -> dict[str, float]:
        """The numbers by name, which begin anew."""
        found: dict[str, float] = {}
        for kind, key, accumulator in self._all():
            found |= {"\t".join((kind, *key, name)): value for name, value in accumulator.numbers.items()}
            accumulator.numbers = {}
        return found

    def put_numbers(self, numbers: dict[str, float]) -> None:
        """Give the accumulators their numbers."""
        for name, value in numbers.items():
            kind, layer, method, number = name.split("\t")
            (self.inputs if kind == "inputs" else self.accumulators)[layer, method].numbers[number] = value

    def _all(self) -> Iterator[tuple[str, Key, InputAccumulator | MatrixAccumulator]]:
        yield from (("inputs", key, inputs) for key, inputs in self.inputs.items())
        yield from (("matrix", key, one) for key, one in self.accumulators.items())


@dataclass(frozen=True)
class BatchRecord:
    """One measured batch, without its inputs.

    Args:
        index: int64 [b], positions of the samples in the calibration set.
        losses: [b], in the model's precision.
        labels: [b], None where there is not one number for each sample.
        n_tokens: unpadded tokens.
        sums: float64, one for each of the ledger's names that were known then; the others are 0.
    """

    index: torch.Tensor
    losses: torch.Tensor
    labels: torch.Tensor | None
    n_tokens: int
    sums: np.ndarray


class Ledger:
    """The measured batches by number, and what their numbers are called."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.records: dict[int, BatchRecord] = {}

    def take(self, sums: PassSums, number: int, batch: Batch, losses: torch.Tensor) -> None:
        """Take the numbers of the batch just measured off the accumulators."""
        found = sums.take_numbers()
        for name in found:
            self.names.setdefault(name, len(self.names))
        values = np.zeros(len(self.names))
        values[[self.names[name] for name in found]] = list(found.values())
        self.records[number] = record_of(batch, losses, values)

    def add(self, other: Ledger) -> None:
        """Take over the batches of another, which has none of these."""
        for name in other.names:
            self.names.setdefault(name, len(self.names))
        places = [self.names[name] for name in other.names]
        for number, record in other.records.items():
            values = np.zeros(len(self.names))
            values[places[: len(record.sums)]] = record.sums
            self.records[number] = BatchRecord(record.index, record.losses, record.labels, record.n_tokens, values)

    def in_order(self) -> list[BatchRecord]:
        """The batches from the first to the last."""
        return [self.records[number] for number in sorted(self.records)]

    def put_back(self, sums: PassSums) -> None:
        """Give the accumulators the numbers over all batches."""
        total = np.zeros(len(self.names))
        for record in self.in_order():
            total[: len(record.sums)] += record.sums
        sums.put_numbers(dict(zip(self.names, total.tolist(), strict=True)))

    @property
    def n_tokens(self) -> int:
        """Unpadded tokens of all batches."""
        return sum(record.n_tokens for record in self.records.values())


def record_of(batch: Batch, losses: torch.Tensor, sums: np.ndarray | None = None) -> BatchRecord:
    """What is kept of a batch; its targets only where there is one number for each sample."""
    one_each = isinstance(batch.labels, torch.Tensor) and batch.labels.dim() == 1
    labels = batch.labels.cpu().clone() if one_each else None
    values = np.zeros(0) if sums is None else sums
    return BatchRecord(batch.index.clone(), losses.cpu(), labels, batch.n_tokens, values)
