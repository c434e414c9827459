"""The module of an adapter."""

from __future__ import annotations

import math

import torch


class BottleneckAdapter(torch.nn.Module):
    """y + U·GELU(D·y + b) + c with U = 0, b = c = 0 at the start (Houlsby et al. 2019, arXiv:1902.00751).

    2·width·rank + rank + width parameters. D is uniform in ±1/√width.
    """

    def __init__(self, width: int, rank: int, seed: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(width)
        weight = torch.empty(rank, width).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        self.down_weight = torch.nn.Parameter(weight)
        self.down_bias = torch.nn.Parameter(torch.zeros(rank))
        self.up_weight = torch.nn.Parameter(torch.zeros(width, rank))
        self.up_bias = torch.nn.Parameter(torch.zeros(width))

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return self.down_weight.shape[0]

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """The adapted output, of the shape and dtype of ``y`` [..., width]."""
        linear = torch.nn.functional.linear
        inner = linear(y.to(self.down_weight.dtype), self.down_weight, self.down_bias)
        return y + linear(torch.nn.functional.gelu(inner), self.up_weight, self.up_bias).to(y.dtype)
