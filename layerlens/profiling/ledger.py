"""What is kept of every measured batch apart: numbers that are added up, and said, in the order of the batches.

float64 sums of a batch's samples (losses, per-sample norms, squares of inputs) are taken off the accumulators after
every batch and put back, added up from the first batch to the last, when all are there. So their bits depend neither on
which process measured which batch nor on when a pass was interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from layerlens.tasks import Batch

if TYPE_CHECKING:
    from layerlens.profiling.capture import Capture

MATRIX_SUMS = ("even", "odd", "trace", "sketched")
INPUT_SUMS = ("tokens", "squares", "sketched")


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
    """The measured batches by number, and what their sums are called."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.records: dict[int, BatchRecord] = {}

    def take(self, capture: Capture, number: int, batch: Batch, losses: torch.Tensor) -> None:
        """Take the sums of the batch just measured off the accumulators."""
        found: dict[str, float] = {}
        for key, one in capture.accumulators.items():
            values = (*one.n_samples, one.trace_sum, one.output_sketch.trace)
            found |= {_name("matrix", key, part): value for part, value in zip(MATRIX_SUMS, values, strict=True)}
            one.n_samples, one.trace_sum, one.output_sketch.trace = [0, 0], 0.0, 0.0
        for key, inputs in capture.inputs.items():
            values = (inputs.n_tokens, inputs.square_sum, inputs.sketch.trace)
            found |= {_name("inputs", key, part): value for part, value in zip(INPUT_SUMS, values, strict=True)}
            inputs.n_tokens, inputs.square_sum, inputs.sketch.trace = 0, 0.0, 0.0
        for name in found:
            self.names.setdefault(name, len(self.names))
        sums = np.zeros(len(self.names))
        sums[[self.names[name] for name in found]] = list(found.values())
        one_each = isinstance(batch.labels, torch.Tensor) and batch.labels.dim() == 1
        labels = batch.labels.cpu().clone() if one_each else None
        self.records[number] = BatchRecord(batch.index.clone(), losses.cpu(), labels, batch.n_tokens, sums)

    def add(self, other: Ledger) -> None:
        """Take over the batches of another, which has none of these."""
        for name in other.names:
            self.names.setdefault(name, len(self.names))
        places = [self.names[name] for name in other.names]
        for number, record in other.records.items():
            sums = np.zeros(len(self.names))
            sums[places[: len(record.sums)]] = record.sums
            self.records[number] = BatchRecord(record.index, record.losses, record.labels, record.n_tokens, sums)

    def in_order(self) -> list[BatchRecord]:
        """The batches from the first to the last."""
        return [self.records[number] for number in sorted(self.records)]

    def put_back(self, capture: Capture) -> None:
        """Give the accumulators the sums over all batches."""
        total = np.zeros(len(self.names))
        for record in self.in_order():
            total[: len(record.sums)] += record.sums
        values = dict(zip(self.names, total.tolist(), strict=True))
        for key, one in capture.accumulators.items():
            even, odd, one.trace_sum, one.output_sketch.trace = (
                values[_name("matrix", key, part)] for part in MATRIX_SUMS
            )
            one.n_samples = [int(even), int(odd)]
        for key, inputs in capture.inputs.items():
            tokens, inputs.square_sum, inputs.sketch.trace = (values[_name("inputs", key, part)] for part in INPUT_SUMS)
            inputs.n_tokens = int(tokens)

    @property
    def n_tokens(self) -> int:
        """Unpadded tokens of all batches."""
        return sum(record.n_tokens for record in self.records.values())


def _name(kind: str, key: tuple[str, str], part: str) -> str:
    return "\t".join((kind, *key, part))
