"""What a rank rule is, and what it may ask about a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerlens.exceptions import ConfigurationError
from layerlens.models import LayerSpec

Ranks = dict[str, int]
"""Layer -> rank; layers without rank are left out."""
Measured = Mapping[str, Mapping[str, Any]]
"""Quantity -> layer -> value."""
QUANTITIES = {
    "weight_gradient": "mean |W ⊙ G| over a layer's weights, with G the mean gradient of the loss; float",
    "gradient_norm": "Frobenius norm of G; float",
    "fisher_trace": "mean over samples of the squared norm of their gradients; float",
    "explained_variance": "shares of the inputs' variance along their principal components, falling; float64 [n_in]",
}
"""What can be measured of every layer for a rule."""


@dataclass(frozen=True)
class RankRule:
    """A published way to spend a budget of trainable parameters on LoRA ranks.

    Args:
        summary: one line for lists, with the paper's name.
        choose: (layers, budget, measured, seed) -> ranks whose parameters together are at most ``budget``. ``measured``
            has what ``needs`` names. It raises ConfigurationError where the layers or the budget do not allow it.
        needs: which of ``QUANTITIES`` are measured before.
    """

    summary: str
    choose: Callable[[Sequence[LayerSpec], int, Measured, int], Ranks]
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.needs if name not in QUANTITIES]
        if unknown:
            raise ConfigurationError(f"rank rule: {unknown[0]!r} is not measured; known: {', '.join(QUANTITIES)}")


def rank_cost(layer: LayerSpec) -> int:
    """Parameters of rank 1."""
    return layer.n_in + layer.n_out


def params_of(layers: Sequence[LayerSpec], ranks: Mapping[str, int]) -> int:
    """Trainable parameters of an allocation."""
    return sum(ranks.get(layer.name, 0) * rank_cost(layer) for layer in layers)
