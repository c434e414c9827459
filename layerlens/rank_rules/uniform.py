"""One LoRA rank everywhere: on every Linear (QLoRA, Dettmers et al. 2023) or on query and value (Hu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from layerlens.exceptions import ConfigurationError
from layerlens.models import LayerSpec
from layerlens.rank_rules.rule import Measured, RankRule, Ranks, rank_cost
from layerlens.utils.order import raised_evenly

QUERY_VALUE_ROLES = ("query", "value", "query_key_value")
"""Roles of the layers that the first LoRA adapted; a fused projection has both, and the key."""


def equal_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """The largest rank on all layers within the budget; what is left buys single layers one rank more.

    Those are spread over the depth as in ``layerlens.optimization.uniform``, so that arms are compared at equal
    parameters; where the budget is a multiple of what rank 1 takes, nothing is left. No rank passes a layer's smaller
    side.
    """
    sides = [min(layer.n_in, layer.n_out) for layer in layers]

    def fits(ranks: Sequence[int]) -> bool:
        return sum(rank * rank_cost(layer) for layer, rank in zip(layers, ranks, strict=True)) <= budget

    low, high = 0, max(sides)
    while low < high:  # the largest rank that fits, by bisection
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits([min(middle, side) for side in sides]) else (low, middle - 1)
    levels = [[min(rank, side) for side in sides] for rank in (low, low + 1)]
    chosen = raised_evenly(levels, fits) or []
    return {layer.name: rank for layer, rank in zip(layers, chosen, strict=True) if rank}


def equal_query_value_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """The same on query and value projections.

    Raises:
        ConfigurationError: there are no layers with these roles.
    """
    chosen = [layer for layer in layers if layer.role in QUERY_VALUE_ROLES]
    if not chosen:
        raise ConfigurationError("baseline lora-qv: no query and value projections were recognised in this model")
    return equal_ranks(chosen, budget, measured, seed)


UNIFORM = RankRule("one LoRA rank on every Linear", equal_ranks)
UNIFORM_QV = RankRule("one LoRA rank on query and value", equal_query_value_ranks)
