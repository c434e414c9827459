"""What adapters are compared with beside each other: every weight of the adapted layers trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerlens.evaluation.lora_stack import Arm


class FullStack:
    """A change of the whole weight of one layer for every arm, [k, i, o], starting at 0."""

    def __init__(self, name: str, module: Any, arms: Sequence[Arm]) -> None:
        self.name = name
        self.arms = torch.arange(len(arms))
        n_out, n_in = module.weight.shape
        self.change = torch.zeros(len(arms), n_in, n_out, requires_grad=True)

    def parameters(self) -> list[torch.Tensor]:
        """What is trained."""
        return [self.change]

    def add_to(self, output: torch.Tensor, h: torch.Tensor, scale: float) -> torch.Tensor:
        """``output`` with every arm's change of its rows."""
        h__kti = h.reshape(len(self.arms), -1, h.shape[-1])
        out__kto = output.reshape(len(self.arms), -1, output.shape[-1])
        return torch.baddbmm(out__kto, h__kti, self.change).view(output.shape)
