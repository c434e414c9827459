"""The diagonal of the empirical Fisher, F_p = mean_n g_n[p]², of every weight of a layer, and what it says in short.

It is the importance of single weights: what elastic weight consolidation protects (Kirkpatrick et al. 2017,
arXiv:1612.00796), what a FISH mask trains (Sung et al. 2021, arXiv:2111.09839) and what Fisher pruning keeps (Theis et
al. 2018, arXiv:1801.05787). A layer whose participation is small has its Fisher in few weights, where a sparse update
serves as well as a dense one; the sums over inputs rank its outputs (neurons, channels, heads).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens import kernels
from layerlens.profiling.accumulators import MatrixAccumulator
from layerlens.profiling.sample_matrices import uses_kernels
from layerlens.profiling.statistics import Statistic
from layerlens.profiling.sums import MatrixBatch, Place, Sum, shape_of_matrix
from layerlens.utils.when_used import ImportedWhenUsed

if TYPE_CHECKING:
    import torch
else:
    torch = ImportedWhenUsed("torch")

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


def _add_squares(total__goi: torch.Tensor, batch: MatrixBatch) -> None:
    for group, outputs, tile__bk in batch.matrices.tiles():
        part = total__goi[group, outputs].view(-1)
        if uses_kernels(tile__bk):
            kernels.fisher_diagonal(tile__bk, part, scale=1.0, threads=batch.threads)
        else:
            part += tile__bk.to(total__goi.dtype).square().sum(dim=0)


SQUARES = Sum("squared gradients", _add_squares, shape_of_matrix, has=lambda batch: batch.multiplies, spread=True)


def _sums(place: Place) -> tuple[Sum, ...]:
    """Of the layers' own matrices: a weight that is looked up as well as multiplied has no tiles of its own."""
    return () if place.method == "weight" else (SQUARES,)


def _result(matrix: MatrixAccumulator) -> dict[str, Any]:
    """Mean, quantiles and participation (Σ F)² / (P Σ F²), from 1/P to 1, of the P weights; sums for each output."""
    if SQUARES.name not in matrix.totals:
        return {}
    diagonal = matrix.totals[SQUARES.name].double().cpu().numpy() / sum(matrix.n_samples)
    trace, energy = float(diagonal.sum()), float(np.square(diagonal).sum())
    return {
        "mean": trace / diagonal.size,
        "participation": trace**2 / (diagonal.size * energy) if energy > 0.0 else 0.0,
        "quantiles": np.quantile(diagonal, QUANTILES),
        "of_outputs": diagonal.sum(axis=-1).ravel(),
    }


def _floats(place: Place) -> int:
    groups, n_out, n_in = place.shape
    return 3 * groups * n_out * n_in


STATISTIC = Statistic(
    "fisher_diagonal", _sums, result=_result, working_floats=_floats, by_samples=True,
    fields=("fisher_diagonal.mean", "fisher_diagonal.participation", "fisher_diagonal.quantiles",
            "fisher_diagonal.of_outputs"),
)  # fmt: skip
