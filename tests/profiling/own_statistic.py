"""A statistic from outside, with every kind of sum: what a package of somebody else would register."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from layerlens.profiling.statistics import MatrixAccumulator, MatrixBatch, ModelSums, Place, Statistic, Sum
from layerlens.registry import STATISTICS

NAME = "output_gradients"


def gradients__bgto(batch: MatrixBatch) -> torch.Tensor:
    assert batch.matrices.d__bgto is not None
    return batch.matrices.d__bgto


def add(total__go: torch.Tensor, batch: MatrixBatch) -> None:
    total__go += gradients__bgto(batch).sum(dim=(0, 2))


def rows(batch: MatrixBatch) -> dict[str, torch.Tensor]:
    return {"sums": gradients__bgto(batch).sum(dim=2)}


TOTAL = Sum("output gradients", add, lambda place: place.shape[:2], has=lambda batch: batch.multiplies)
SQUARES = Sum(
    "squared output gradients", lambda batch: float(gradients__bgto(batch).double().square().sum()),
    reduction="batches", has=lambda batch: batch.multiplies,
)  # fmt: skip
ROWS = Sum("output gradients of samples", rows, reduction="samples", has=lambda batch: batch.multiplies)
OF_LAYERS = Sum(
    "over layers", lambda batch: gradients__bgto(batch).double().square().sum(dim=(1, 2, 3)), reduction="layers",
    has=lambda batch: batch.multiplies,
)  # fmt: skip


def sums(place: Place) -> tuple[Sum, ...]:
    return (TOTAL, SQUARES, ROWS, OF_LAYERS) if place.method == "lora" else ()


def result(matrix: MatrixAccumulator) -> dict[str, Any]:
    if TOTAL.name not in matrix.totals:
        return {}
    n = sum(matrix.n_samples)
    mean = (matrix.totals[TOTAL.name].double() / n).numpy().ravel()
    return {"mean": mean, "square": matrix.numbers[SQUARES.name] / n}


def part(matrix: MatrixAccumulator) -> np.ndarray | None:
    kept = [rows["sums"] for _, rows in sorted(matrix.kept.get(ROWS.name, {}).items())]
    return torch.cat(kept).double().square().sum(dim=(1, 2)).numpy() if kept else None


def of_model(model: ModelSums) -> dict[str, Any]:
    """For every sample, in the order of the calibration set; and of all layers together."""
    order = torch.cat(list(model.index)).argsort().numpy()
    over_layers = model.rows.joined(OF_LAYERS.name).numpy()[order]
    return {
        "of_samples": np.sum(model.parts, axis=0)[order],
        "over_layers": over_layers,
        "layers": float(len(model.parts)),
    }


STATISTIC = Statistic(NAME, sums, result=result, part=part, model_result=of_model, fields=(f"{NAME}.square",))


@contextmanager
def registered() -> Iterator[None]:
    STATISTICS.register(NAME, STATISTIC)
    try:
        yield
    finally:
        STATISTICS.unregister(NAME)
