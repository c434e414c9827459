"""Arms of the study that are not LoRA alone: bottleneck adapters beside LoRA, and all weights of the layers trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerlens.evaluation.stacks import Arm, LayerStack


class AdapterStack:
    """Bottleneck adapters y + U·GELU(D·y + b) + c of one layer for every arm, U = b = c = 0 at the start."""

    def __init__(self, name: str, module: Any, arms: Sequence[Arm], rank: int) -> None:
        self.name, self.arms = name, torch.arange(len(arms))
        width = module.weight.shape[0]
        down = torch.empty(len(arms), width, rank)
        for position, arm in enumerate(arms):
            generator = torch.Generator().manual_seed(arm.seed * 1_000_003 + len(name) + width)
            down[position].uniform_(-(width**-0.5), width**-0.5, generator=generator)
        self.down = down.requires_grad_(True)
        self.up, self.b, self.c = (
            torch.zeros(len(arms), *shape, requires_grad=True) for shape in ((rank, width), (1, rank), (1, width))
        )

    def parameters(self) -> list[torch.Tensor]:
        """What is trained, each with its arms first."""
        return [self.down, self.up, self.b, self.c]

    def add_to(self, output: torch.Tensor, h: torch.Tensor, scale: float) -> torch.Tensor:
        """``output`` [k·b, ..., o] with every arm's adapter."""
        y__kto = output.reshape(len(self.arms), -1, output.shape[-1])
        inner = torch.nn.functional.gelu(torch.baddbmm(self.b, y__kto, self.down))
        return (y__kto + torch.baddbmm(self.c, inner, self.up)).view(output.shape)


class Mixed:
    """Makes an adapter where the allocation has one, LoRA elsewhere."""

    def __init__(self, adapters: Mapping[str, int]) -> None:
        self.adapters = adapters

    def __call__(self, name: str, module: Any, arms: Sequence[Arm]) -> Any:
        if name in self.adapters:
            return AdapterStack(name, module, arms, self.adapters[name])
        return LayerStack(name, module, arms)


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
