"""Random projections of gradient matrices and factors: statistics for a fraction of the cost, each with its error.

Projections are Rademacher signs from a counter-based generator, drawn from the layer's name alone: the same on every
machine, for every batch size and number of threads. With d [tokens, o] and z [tokens, i] a layer projects P = d Ψ and
Q = z Ω once, and ``statistics.sketches`` and ``statistics.ntk`` follow from them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from layerlens import kernels
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

COLUMNS = 80
"""Columns of Ω that the approximation is made from; some more than the 64 values that are read."""

ROWS = 160
"""Columns of Ψ: twice as many, so that solving for the core does not amplify the tail."""

PROBES = 8
"""Further columns of Ω, from which the error is estimated."""


def worth_sketching(shape: tuple[int, int, int]) -> bool:
    """Whether the sketched spectrum of a (g, o, i) matrix takes fewer multiplications than the matrix itself."""
    groups, n_out, n_in = shape
    return groups == 1 and (COLUMNS + PROBES + ROWS) * (n_out + n_in) < n_out * n_in


def signs(seed_text: str, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """±1 [rows, columns] that depend on the text alone, in the dtype and on the device of ``like``."""
    seed = int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:8], "big") >> 1
    flat = np.asarray(kernels.rademacher(rows * columns, seed=seed), dtype=np.float32)
    return torch.from_numpy(flat.reshape(rows, columns)).to(like)


class Projection:
    """Ω and Ψ of one layer, drawn when they are first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._drawn: dict[str, torch.Tensor] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def omega__ik(self, n_in: int, like: torch.Tensor) -> torch.Tensor:
        """Ω [n_in, COLUMNS + PROBES], in the dtype and on the device of ``like``."""
        return self._signs("inputs", n_in, COLUMNS + PROBES, like)

    def psi__ol(self, n_out: int, like: torch.Tensor) -> torch.Tensor:
        """Ψ [n_out, ROWS], in the dtype and on the device of ``like``."""
        return self._signs("gradients", n_out, ROWS, like)

    def of_inputs(self, z: torch.Tensor) -> torch.Tensor:
        """z Ω, [..., COLUMNS + PROBES]; of the same rows as the last time without another product."""
        if self._last is None or not _same_rows(self._last[0], z):
            self._last = z, z @ self.omega__ik(z.shape[-1], z)
        return self._last[1].view(*z.shape[:-1], -1)

    def forget(self) -> None:
        """Let go of the rows that were last projected."""
        self._last = None

    def of_gradients(self, d: torch.Tensor) -> torch.Tensor:
        """d Ψ, [..., ROWS]."""
        return d @ self.psi__ol(d.shape[-1], d)

    def _signs(self, side: str, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        if side not in self._drawn:
            self._drawn[side] = signs(f"{self.name}|{side}", rows, columns, like)
        return self._drawn[side].to(like)  # exact in every dtype


def _same_rows(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same memory, maybe in another shape; ``one`` is alive, so its address is its own."""
    return (
        one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.dtype == other.dtype
        and one.is_contiguous() and other.is_contiguous()
    )  # fmt: skip
