"""Sums that one pass over the calibration data makes, each declared once, and what holds them for a matrix or an input.

Everything else follows from a declaration: what is kept of an unfinished pass, how the shares of several processes
become one, what a streamed block leaves behind, and how much memory is predicted (``Sum.shape``). Axes as in
``sample_matrices``. Numbers are float64; tensors have the model's precision, at least float32, and are updated in
place, which saves a pass over the largest arrays of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from layerlens.profiling.projections import Projection, worth_sketching
from layerlens.profiling.sample_matrices import SampleMatrices, squared_norm, sum_of_squares
from layerlens.profiling.sum_shards import SumShards

Value = TypeVar("Value")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """A matrix that is measured: what the sums that it has, and their shapes, follow from.

    Args:
        shape: (g, o, i).
        method: "lora", "adapter", "prefix" ..., or "weight" for a weight outside the layers.
        projected: whether there are random projections for it.
        sketched: whether its sketch takes fewer multiplications than the matrix itself.
        kernel_samples: samples of the neural tangent kernel.
        kernel_sketched: whether these are too many to be kept.
        tokens: of the longest sequence, for predictions; 0 where the batches tell.
    """

    shape: Shape
    method: str
    projected: bool = False
    sketched: bool = False
    kernel_samples: int = 0
    kernel_sketched: bool = False
    tokens: int = 0


def shape_of_matrix(place: Place) -> tuple[int, ...]:
    """(g, o, i)."""
    return place.shape


def _everywhere(batch: Any) -> bool:
    return True


@dataclass(frozen=True)
class Sum:
    """Something that is added up over the samples, for each matrix or for each input that matrices share.

    Args:
        name: no two sums of matrices, and no two of inputs, have the same.
        add: what a batch (``MatrixBatch`` or ``InputBatch``) adds, by ``reduction``.
        shape: of its tensors, from the place of the matrix.
        reduction: "sum": ``add(total, batch)`` adds to a tensor in place, and processes' totals are added up;
            "batches": ``add(batch)`` is a number, kept for each batch and added up in their order, so that its bits
            depend neither on interruptions nor on processes;
            "samples": ``add(batch)`` is a dict of tensors [b, ...] to be kept, empty for none;
            "layers": ``add(batch)`` is a tensor [b, ...], added up over the layers and kept for every sample.
        has: whether a batch has it (a weight that is looked up has no inputs).
        spread: whether it is spread over processes where the weights are; for tensors [g, o, i].
        projects: whether it reads random projections.
        instead_of: name of another sum that is needless where this one is made.
    """

    name: str
    add: Callable[..., Any]
    shape: Callable[[Place], tuple[int, ...]] = lambda place: ()
    reduction: str = "sum"
    has: Callable[[Any], bool] = _everywhere
    spread: bool = False
    projects: bool = False
    instead_of: str = ""

    def bytes(self, place: Place) -> int:
        """What it takes of memory in float32, predicted; nothing to speak of for numbers."""
        return 0 if self.reduction in ("batches", "layers") else 4 * math.prod(self.shape(place))


class InputBatch:
    """The inputs of one call, zero where they are padding: what sums of inputs are given.

    Args:
        z__bgti: the inputs.
        threads: for the kernels.
        projection: None where inputs are not projected.
    """

    def __init__(self, z__bgti: torch.Tensor, threads: int, projection: Projection | None) -> None:
        self.z__bgti = z__bgti
        self.projection = projection
        self.threads = threads

    @property
    def projects(self) -> bool:
        """Whether the inputs can be projected."""
        return self.projection is not None

    @cached_property
    def rows__ni(self) -> torch.Tensor:
        """The inputs of every token of every group."""
        return self.z__bgti.reshape(-1, self.z__bgti.shape[-1])

    @cached_property
    def squares(self) -> float:
        """Sum of all squares."""
        return sum_of_squares(self.rows__ni, self.threads)


class MatrixBatch:
    """The matrices of the samples of one batch: what sums of matrices are given.

    Args:
        matrices: of its samples.
        half__b: which half (0 or 1) of the calibration set each sample belongs to.
        before: samples in the batches that come before it, measured here or elsewhere.
        threads: for the kernels.
        projection: None where the matrix is not projected.
    """

    def __init__(
        self, matrices: SampleMatrices, half__b: torch.Tensor, before: int, threads: int, projection: Projection | None
    ) -> None:
        self.matrices = matrices
        self.half__b = half__b
        self.before = before
        self.threads = threads
        self.projection = projection

    def of_half(self, half: int) -> slice | torch.Tensor | None:
        """Where the samples of a half are: a slice where they are together, which copies nothing; None for none."""
        chosen__b = (self.half__b == half).nonzero().flatten()
        if len(chosen__b) == 0:
            return None
        first, last = int(chosen__b[0]), int(chosen__b[-1])
        return slice(first, last + 1) if last - first + 1 == len(chosen__b) else chosen__b

    @property
    def multiplies(self) -> bool:
        """Whether there are output gradients and inputs; not for a weight that is only looked up."""
        return self.matrices.d__bgto is not None and self.matrices.z__bgti is not None

    @property
    def projects(self) -> bool:
        """Whether these can be projected."""
        return self.projection is not None and self.multiplies

    @property
    def d__bto(self) -> torch.Tensor:
        """Output gradients of the only group."""
        assert self.matrices.d__bgto is not None
        return self.matrices.d__bgto[:, 0]

    @property
    def z__bti(self) -> torch.Tensor:
        """Inputs of the only group."""
        assert self.matrices.z__bgti is not None
        return self.matrices.z__bgti[:, 0]

    @cached_property
    def projected_d__btl(self) -> torch.Tensor:
        """d Ψ."""
        assert self.projection is not None
        return self.projection.of_gradients(self.d__bto)

    @cached_property
    def projected_z__btk(self) -> torch.Tensor:
        """z Ω."""
        assert self.projection is not None
        return self.projection.of_inputs(self.z__bti)


class Totals:
    """What has been added up of some declared sums.

    Args:
        sums: the declared sums.
    """

    def __init__(self, sums: Sequence[Sum]) -> None:
        self.sums = {declared.name: declared for declared in sums}
        self.totals: dict[str, torch.Tensor] = {}
        self.numbers: dict[str, float] = {}
        self.kept: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
        self._computed: dict[str, Any] = {}

    def count(self, name: str, value: float) -> None:
        """Add to a number."""
        self.numbers[name] = self.numbers.get(name, 0.0) + value

    def once(self, name: str, compute: Callable[[], Value]) -> Value:
        """What ``compute`` returns, computed once for all statistics that read it."""
        if name not in self._computed:
            self._computed[name] = compute()
        found: Value = self._computed[name]
        return found

    def forget(self) -> None:
        """Let go of what ``once`` computed."""
        self._computed.clear()


class InputAccumulator(Totals):
    """Sums over tokens of the inputs of one layer. Layers with the same input (query, key and value) share one."""

    def __init__(self, sums: Sequence[Sum], threads: int, projection: Projection | None = None) -> None:
        super().__init__(sums)
        self.threads = threads
        self.projection = projection

    @property
    def n_tokens(self) -> int:
        """Unpadded tokens; counted where anything is summed."""
        return int(self.numbers.get("tokens", 0))

    def add(self, z__bgti: torch.Tensor, mask__bt: torch.Tensor | None) -> None:
        """Add the inputs of one call, zero where ``mask__bt`` is 0."""
        if not self.sums:
            return
        b, g, t, _ = z__bgti.shape
        self.count("tokens", b * t if mask__bt is None else int(mask__bt.sum()))
        batch = InputBatch(z__bgti, self.threads, self.projection if g == 1 else None)
        place = Place((g, z__bgti.shape[-1], z__bgti.shape[-1]), "")
        for name, declared in self.sums.items():
            if not declared.has(batch):
                continue
            if declared.reduction == "batches":
                self.count(name, declared.add(batch))
                continue
            if name not in self.totals:
                self.totals[name] = torch.zeros(declared.shape(place), dtype=_wide(z__bgti), device=z__bgti.device)
            declared.add(self.totals[name], batch)


class LayerRows:
    """Rows of every sample that are added up over the layers, by the sum and the samples before the batch."""

    def __init__(self) -> None:
        self.done: dict[str, dict[int, torch.Tensor]] = {}
        self._current: dict[str, torch.Tensor] = {}
        self._before = 0

    def begin(self, before: int) -> None:
        """A batch begins, or goes on with other layers, which ``before`` samples come before."""
        self._before = before
        self._current = {name: rows[before] for name, rows in self.done.items() if before in rows}

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Add what one layer has."""
        self._current[name] = self._current[name].add_(rows) if name in self._current else rows

    def end(self) -> None:
        """All layers that are measured now are in."""
        for name, rows in self._current.items():
            self.done.setdefault(name, {})[self._before] = rows
        self._current = {}

    def joined(self, name: str) -> torch.Tensor:
        """The rows of all samples, in the order of the batches."""
        return torch.cat([rows for _, rows in sorted(self.done[name].items())])


class MatrixAccumulator(Totals):
    """Sums over samples of one matrix.

    Args:
        sums: which.
        place: the matrix.
        threads: for the kernels.
        inputs: where the same layer's inputs are summed.
        projection: for sketches; None for matrices that are not sketched (lookups, heads).
        rows: where sums over layers go.
        shards: where the sums that can be are spread over processes; None where each keeps its own.
    """

    def __init__(
        self,
        sums: Sequence[Sum],
        place: Place,
        threads: int,
        inputs: InputAccumulator,
        projection: Projection | None = None,
        rows: LayerRows | None = None,
        shards: SumShards | None = None,
    ) -> None:
        super().__init__(sums)
        self.place = place
        self.threads = threads
        self.inputs = inputs
        self.projection = projection
        self.rows = rows
        self.shards = shards

    @property
    def n_samples(self) -> tuple[int, int]:
        """Samples of each half."""
        return int(self.numbers.get("even", 0)), int(self.numbers.get("odd", 0))

    @property
    def spread(self) -> list[Sum]:
        """The sums that are spread over processes."""
        return [declared for declared in self.sums.values() if declared.spread and self.shards is not None]

    def squared_norm(self, tensor: torch.Tensor) -> float:
        """Sum of squares, in float64."""
        return squared_norm(tensor, self.threads)

    def add(self, matrices: SampleMatrices, half__b: torch.Tensor, before: int, *, counted: bool = True) -> None:
        """Add one batch (see ``MatrixBatch``); one that is not counted takes part in what processes add up together."""
        batch = MatrixBatch(matrices, half__b, before, self.threads, self.projection)
        if not counted:
            for declared in self.spread:
                self._add_part(declared, batch, counted=False)
            return
        for half, name in enumerate(("even", "odd")):
            self.count(name, int((half__b == half).sum()))
        for name, declared in self.sums.items():
            if not declared.has(batch):
                continue
            if declared.reduction == "batches":
                self.count(name, declared.add(batch))
            elif declared.reduction == "samples":
                if rows := declared.add(batch):
                    self.kept.setdefault(name, {})[before] = rows
            elif declared.reduction == "layers":
                if self.rows is not None:
                    self.rows.add(name, declared.add(batch))
            elif self.shards is not None and declared.spread:
                self._add_part(declared, batch)
            else:
                if name not in self.totals:
                    self.totals[name] = self._zeros(declared, matrices)
                declared.add(self.totals[name], batch)
        if self.projection is not None:
            self.projection.forget()

    def _add_part(self, declared: Sum, batch: MatrixBatch, *, counted: bool = True) -> None:
        assert self.shards is not None
        part = self._zeros(declared, batch.matrices)
        if declared.name not in self.totals:
            self.totals[declared.name] = self.shards.zeros(self.place.shape, part.dtype, part.device)
        if counted:
            declared.add(part, batch)
        self.shards.add(self.totals[declared.name], part)

    def _zeros(self, declared: Sum, matrices: SampleMatrices) -> torch.Tensor:
        return torch.zeros(declared.shape(self.place), dtype=_wide(matrices.first), device=matrices.first.device)


def place_of(
    shape: Shape, method: str, *, projected: bool, kernel_samples: int, kernel_sketched: bool, tokens: int = 0
) -> Place:
    """The place of a matrix, whose layer has projections or not."""
    projected = projected and shape[0] == 1
    sketched = projected and worth_sketching(shape)
    return Place(shape, method, projected, sketched, kernel_samples, kernel_sketched, tokens)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
