"""What a rank rule is, what it may ask about a layer, and ranks in proportion to a weight of each layer."""

from __future__ import annotations

import math
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


def proportional_ranks(
    layers: Sequence[LayerSpec], weights: Mapping[str, float], budget: int, *, least: int = 0, most: int | None = None
) -> Ranks:
    """LoRA ranks in proportion to ``weights``, as near to ``budget`` as whole ranks allow.

    The scale is the largest with Σ rank·(n_in + n_out) within the budget; what is left goes to the layers that
    rounding cut most, one rank each.

    Args:
        layers: layers to choose ranks for.
        weights: not negative, by layer name.
        budget: trainable parameters.
        least, most: limits of every rank; a layer's smaller side limits it too.

    Raises:
        ConfigurationError: the least ranks are too much.
    """
    cost = {layer.name: rank_cost(layer) for layer in layers}
    limit = {layer.name: min(layer.n_in, layer.n_out, most or layer.n_in) for layer in layers}
    weight = {name: max(float(weights[name]), 0.0) for name in cost}

    def ranks(scale: float) -> Ranks:
        return {name: min(limit[name], max(least, math.floor(scale * weight[name]))) for name in cost}

    def used(chosen: Mapping[str, int]) -> int:
        return sum(rank * cost[name] for name, rank in chosen.items())

    if used(ranks(0.0)) > budget:
        raise ConfigurationError(
            f"baseline: rank {least} on {len(layers)} layers trains {used(ranks(0.0)):,} parameters, more than the "
            f"budget of {budget:,}"
        )
    low, high = 0.0, 1.0
    while used(ranks(high)) <= budget and any(ranks(high)[name] < limit[name] for name in cost if weight[name] > 0.0):
        low, high = high, 2.0 * high
    for _ in range(60):  # to the last bit of the scale
        middle = 0.5 * (low + high)
        low, high = (middle, high) if used(ranks(middle)) <= budget else (low, middle)
    chosen = ranks(low)
    left = budget - used(chosen)
    for name in sorted(cost, key=lambda name: (chosen[name] - low * weight[name], name)):
        if cost[name] <= left and chosen[name] < limit[name] and weight[name] > 0.0:
            chosen[name] += 1
            left -= cost[name]
    return {name: rank for name, rank in chosen.items() if rank > 0}
