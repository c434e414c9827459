"""What holds the declared sums of one matrix, of inputs that matrices share, and of rows that layers add up to.

Sums of gradients are sharded over processes by rows where the weights are too: each keeps its share of every sum, and
after every batch the processes' parts of a layer's sum are added up and handed out in one reduce-scatter, as FSDP does
with gradients. They make the passes together, so they come to the layers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from layerlens.profiling.projections import Projection, worth_sketching
from layerlens.profiling.sample_matrices import SampleMatrices, squared_norm
from layerlens.profiling.sums import InputBatch, MatrixBatch, Place, Shape, Sum
from layerlens.utils.processes import Processes
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

Value = TypeVar("Value")
TOKENS_OF = "tokens of group "


class SumShards:
    """How the rows of a [g, o, i] sum are dealt out: equal numbers of them in order, padded at the end."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def zeros(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """This process's rows of an empty sum, [rows, i]."""
        return torch.zeros(self._rows(shape), shape[2], dtype=dtype, device=device)

    def add(self, share: torch.Tensor, part__goi: torch.Tensor) -> None:
        """Add this process's rows of the sum of all processes' parts to ``share`` in place."""
        size, (_, _, i) = self.processes.size, part__goi.shape
        rows = part__goi.flatten(0, 1)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, size * len(share) - len(rows)))
        summed = torch.empty(len(share), i, dtype=share.dtype, device=share.device)
        self.processes.add_and_share(summed, padded)
        share += summed

    def whole(self, share: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor | None:
        """At process 0 the whole sum, [g, o, i] in main memory; None at the others."""
        parts = self.processes.gather(share.cpu())
        return torch.cat(parts)[: shape[0] * shape[1]].view(shape) if parts else None

    def _rows(self, shape: tuple[int, int, int]) -> int:
        return -(-shape[0] * shape[1] // self.processes.size)


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
    def n_tokens(self) -> float:
        """Unpadded tokens, for each group; counted where anything is summed."""
        return self.numbers.get("tokens", 0.0)

    @property
    def tokens__g(self) -> np.ndarray | None:
        """Tokens of each group, where groups have tokens of their own (experts); else None."""
        counts = [self.numbers[name] for name in self.numbers if name.startswith(TOKENS_OF)]
        return np.array(counts, dtype=np.float64) if counts else None

    def mean(self, totals__gkk: torch.Tensor) -> torch.Tensor:
        """Totals of each group over its tokens; 0 where it has none."""
        counts = self.tokens__g
        if counts is None:
            return totals__gkk / self.n_tokens
        return totals__gkk / torch.from_numpy(counts).to(totals__gkk).clamp_min(1.0)[:, None, None]

    def add(self, z__bgti: torch.Tensor, mask__bt: torch.Tensor | None, counts__bg: torch.Tensor | None = None) -> None:
        """Add the inputs of one call, zero where ``mask__bt`` is 0 or beyond ``counts__bg``."""
        if counts__bg is not None:
            for group, tokens in enumerate(counts__bg.sum(dim=0).tolist()):
                self.count(f"{TOKENS_OF}{group}", tokens)
        if not self.sums:
            return
        b, g, t, _ = z__bgti.shape
        if counts__bg is None:
            self.count("tokens", b * t if mask__bt is None else int(mask__bt.sum()))
        else:
            self.count("tokens", int(counts__bg.sum()) / g)
        batch = InputBatch(z__bgti, self.threads, self.projection if g == 1 else None)
        place = Place((g, z__bgti.shape[-1], z__bgti.shape[-1]), "")
        self._add([one for one in self.sums.values() if one.has(batch)], batch, place, z__bgti)

    def add_indices(
        self, ids__bt: torch.Tensor, mask__bt: torch.Tensor | None, n_rows: int, like: torch.Tensor
    ) -> None:
        """Add the indices of one call, each an input of ``n_rows`` features; totals are made ``like`` a tensor."""
        if not self.sums:
            return
        ids__n = ids__bt.flatten() if mask__bt is None else ids__bt[mask__bt.bool()]
        self.count("tokens", len(ids__n))
        batch = InputBatch(like.new_empty(0, 1, 0, n_rows), self.threads, None, ids__n)
        usable = [one for one in self.sums.values() if one.of_indices and one.has(batch)]
        self._add(usable, batch, Place((1, n_rows, like.shape[-1]), "", looked_up=True), like)

    def _add(self, sums: Sequence[Sum], batch: InputBatch, place: Place, like: torch.Tensor) -> None:
        for declared in sums:
            name = declared.name
            if declared.reduction == "batches":
                self.count(name, declared.add(batch))
                continue
            if name not in self.totals:
                self.totals[name] = torch.zeros(declared.shape(place), dtype=_wide(like), device=like.device)
            declared.add(self.totals[name], batch)


class LayerRows:
    """Rows of every sample that are added up over the layers, by the sum and the samples before the batch."""

    def __init__(self) -> None:
        self.done: dict[str, dict[int, torch.Tensor]] = {}
        self._current: dict[str, torch.Tensor] = {}
        self._before = 0

    def begin(self, before: int) -> None:
        """A batch begins, or continues with other layers, which ``before`` samples come before."""
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
        shards: where the sums that can be are sharded over processes; None where each keeps its own.
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
        """The sums that are sharded over processes."""
        return [declared for declared in self.sums.values() if declared.spread and self.shards is not None]

    def squared_norm(self, tensor: torch.Tensor) -> float:
        """Sum of squares, in float64."""
        return squared_norm(tensor, self.threads)

    def add(self, matrices: SampleMatrices, half__b: torch.Tensor, before: int, *, counted: bool = True) -> None:
        """Add one batch (see ``MatrixBatch``); one that is not counted takes part in what processes add up together."""
        batch = MatrixBatch(matrices, half__b, before, self.threads, self.projection, self.place.shape[1])
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
    shape: Shape, method: str, *, projected: bool, kernel_samples: int, kernel_sketched: bool, tokens: int = 0,
    looked_up: bool = False,
) -> Place:  # fmt: skip
    """The place of a matrix, whose layer has projections or not."""
    projected = projected and shape[0] == 1
    sketched = projected and worth_sketching(shape) and not looked_up
    return Place(shape, method, projected, sketched, kernel_samples, kernel_sketched, tokens, looked_up)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
