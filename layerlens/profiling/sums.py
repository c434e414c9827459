"""Sums that one pass over the calibration data makes, each declared once, and what they are given of a batch.

Everything else follows from a declaration: what is kept of an unfinished pass, how the shares of several processes
become one, what a streamed block leaves behind, and how much memory is predicted (``Sum.shape``). Axes as in
``sample_matrices``. Numbers are float64; tensors have the model's precision, at least float32, and are updated in
place, which saves a pass over the largest arrays of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from layerlens.profiling.projections import Projection
from layerlens.profiling.sample_matrices import SampleMatrices, sum_of_squares
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

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
        looked_up: whether it is the weight of an embedding that is a layer; o is then its rows, i its features.
    """

    shape: Shape
    method: str
    projected: bool = False
    sketched: bool = False
    kernel_samples: int = 0
    kernel_sketched: bool = False
    tokens: int = 0
    looked_up: bool = False


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
        spread: whether it is sharded over processes where the weights are; for tensors [g, o, i].
        projects: whether it reads random projections.
        instead_of: name of another sum that is needless where this one is made.
        of_indices: of inputs: whether it is also made of those that are indices (``InputBatch.ids__n``).
    """

    name: str
    add: Callable[..., Any]
    shape: Callable[[Place], tuple[int, ...]] = lambda place: ()
    reduction: str = "sum"
    has: Callable[[Any], bool] = _everywhere
    spread: bool = False
    projects: bool = False
    instead_of: str = ""
    of_indices: bool = False

    def bytes(self, place: Place) -> int:
        """What it takes of memory in float32, predicted; nothing to speak of for numbers."""
        return 0 if self.reduction in ("batches", "layers") else 4 * math.prod(self.shape(place))


class InputBatch:
    """The inputs of one call, zero where they are padding: what sums of inputs are given.

    Args:
        z__bgti: the inputs.
        threads: for the kernels.
        projection: None where inputs are not projected.
        ids__n: where rows are looked up, their indices without padding: as inputs, each is one 1 among zeros. There are
            no ``z__bgti`` then.
    """

    def __init__(
        self, z__bgti: torch.Tensor, threads: int, projection: Projection | None, ids__n: torch.Tensor | None = None
    ) -> None:
        self.z__bgti = z__bgti
        self.projection = projection
        self.threads = threads
        self.ids__n = ids__n

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
        return sum_of_squares(self.rows__ni, self.threads) if self.ids__n is None else float(len(self.ids__n))


class MatrixBatch:
    """The matrices of the samples of one batch: what sums of matrices are given.

    Args:
        matrices: of its samples.
        half__b: which half (0 or 1) of the calibration set each sample belongs to.
        before: samples in the batches that come before it, measured here or elsewhere.
        threads: for the kernels.
        projection: None where the matrix is not projected.
        n_rows: outputs of the matrix, or rows of what is looked up.
    """

    def __init__(
        self, matrices: SampleMatrices, half__b: torch.Tensor, before: int, threads: int, projection: Projection | None,
        n_rows: int = 0,
    ) -> None:  # fmt: skip
        self.matrices = matrices
        self.half__b = half__b
        self.before = before
        self.threads = threads
        self.projection = projection
        self.n_rows = n_rows

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
    def has_features(self) -> bool:
        """Whether ``projected_d__btl`` and ``projected_z__btk`` are there: also of rows that are looked up alone."""
        return self.projection is not None and (self.multiplies or self.matrices.rows__bti is not None)

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
        if self.multiplies:
            return self.projection.of_gradients(self.d__bto)
        rows, ids = self.matrices.rows__bti, self.matrices.ids__bt  # d is 1 at the index, so d Ψ is a row of Ψ
        assert rows is not None
        assert ids is not None
        return self.projection.psi__ol(self.n_rows, rows)[ids]

    @cached_property
    def projected_z__btk(self) -> torch.Tensor:
        """z Ω."""
        assert self.projection is not None
        rows = self.matrices.rows__bti
        return self.projection.of_inputs(self.z__bti if self.multiplies or rows is None else rows)
