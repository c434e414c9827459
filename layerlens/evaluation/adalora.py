"""AdaLoRA (Zhang et al. 2023) for stacked arms: rank is taken from all layers' triplets while training.

ΔW = scale · Σ_i λ_i b_i a_iᵀ. A triplet's importance is I(λ_i) + mean I(a_i) + mean I(b_i) with I the smoothed
sensitivity |p·∂L/∂p| times its smoothed uncertainty. The budget falls by the paper's cubic schedule from all triplets
to ``budget`` parameters; triplets are switched off through λ and can come back while the budget still falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerlens.evaluation.lora_stack import Arm, LayerStack

SMOOTHING = 0.85
ORTHOGONALITY = 0.5
"""PEFT's default weight of ‖A Aᵀ − I‖² and ‖BᵀB − I‖²."""
INITIAL_DEVIATION = 0.02
FIRST_SHARE, LAST_SHARE = 0.1, 0.6
"""The budget falls between these shares of the steps."""


class TripletStack(LayerStack):
    """The triplets of one layer, [k, r] of them; every arm adapts every layer."""

    def __init__(self, name: str, module: Any, arms: Sequence[Arm]) -> None:
        super().__init__(name, module, arms)
        if len(self.arms) != len(arms):
            raise ValueError("AdaLoRA starts with rank in every layer")
        k, n_in, rank = self.a.shape
        self.cost = n_in + self.b.shape[2]
        with torch.no_grad():
            for position, arm in enumerate(arms):
                generator = torch.Generator().manual_seed(arm.seed * 1_000_003 + len(name) + n_in)
                self.a[position] = INITIAL_DEVIATION * torch.randn(n_in, rank, generator=generator)
                self.b[position] = INITIAL_DEVIATION * torch.randn(rank, self.b.shape[2], generator=generator)
        self.values = torch.zeros(k, rank, requires_grad=True)
        self.mask = torch.ones(k, rank)
        self._smoothed = [torch.zeros_like(parameter) for parameter in self.parameters()]
        self._uncertain = [torch.zeros_like(parameter) for parameter in self.parameters()]

    def parameters(self) -> list[torch.Tensor]:
        """Triplets' three parts; only a and b before ``values`` is made."""
        return [self.a, self.b, *([self.values] if hasattr(self, "values") else [])]

    def inner(self, h__kti: torch.Tensor) -> torch.Tensor:
        """λ A h, [k, t, r]."""
        return torch.bmm(h__kti, self.a) * (self.values * self.mask)[:, None]

    def penalty(self) -> torch.Tensor:
        """The orthogonality loss, summed over arms."""
        eye = torch.eye(self.a.shape[2])
        of_a, of_b = self.a.mT @ self.a - eye, self.b @ self.b.mT - eye
        return ORTHOGONALITY * (of_a.square().sum() + of_b.square().sum())

    @torch.no_grad()
    def after_backward(self) -> None:
        """Smooth the sensitivities of this step's gradients."""
        for parameter, smoothed, uncertain in zip(self.parameters(), self._smoothed, self._uncertain, strict=True):
            assert parameter.grad is not None
            sensitivity = (parameter * parameter.grad).abs()
            smoothed.lerp_(sensitivity, 1.0 - SMOOTHING)
            uncertain.lerp_((sensitivity - smoothed).abs(), 1.0 - SMOOTHING)

    def importance(self) -> torch.Tensor:
        """[k, r]."""
        of_a, of_b, of_values = (s * u for s, u in zip(self._smoothed, self._uncertain, strict=True))
        return of_values + of_a.mean(dim=1) + of_b.mean(dim=2)


class AdaLora:
    """Makes the layers' triplets and keeps their budget.

    Args:
        budget: trainable parameters at the end, λ not counted.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def __call__(self, name: str, module: Any, arms: Sequence[Arm]) -> TripletStack:
        return TripletStack(name, module, arms)

    def after_step(self, layers: Sequence[TripletStack], step: int, steps: int) -> None:
        """Switch off the least important triplets beyond this step's budget."""
        first, last = round(FIRST_SHARE * steps), round(LAST_SHARE * steps)
        if step < first or step > last:
            return
        everything = sum(layer.cost * layer.mask.shape[1] for layer in layers)
        left = (1.0 - (step - first) / max(1, last - first)) ** 3
        allowed = self.budget + (everything - self.budget) * left
        importance = torch.cat([layer.importance() for layer in layers], dim=1)
        costs = torch.cat([torch.full((layer.mask.shape[1],), float(layer.cost)) for layer in layers])
        order = importance.argsort(dim=1, descending=True)
        kept = torch.zeros_like(importance)
        kept.scatter_(1, order, (costs[order].cumsum(dim=1) <= allowed).float())
        for layer, mask in zip(layers, kept.split([layer.mask.shape[1] for layer in layers], dim=1), strict=True):
            layer.mask = mask
