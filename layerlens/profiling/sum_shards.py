"""Gradient sums that are spread over processes by rows, where the weights are too.

Each process keeps its share of every sum. After every batch the processes' parts of a layer's sum are added up and
handed out in one reduce-scatter, as FSDP does with gradients. They make the passes together, so they come to the layers
in the same order.
"""

from __future__ import annotations

import torch

from layerlens.utils.processes import Processes


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
