"""Published rules: one rank everywhere, ranks in proportion to a figure of each layer (as GoRA), EVA, and chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from layerlens.exceptions import ConfigurationError
from layerlens.models import LayerSpec
from layerlens.rank_rules.rule import Measured, RankRule, Ranks, params_of, rank_cost
from layerlens.utils.order import raised_evenly

QUERY_VALUE_ROLES = ("query", "value", "query_key_value")
"""Roles of the layers that the first LoRA adapted; a fused projection has both, and the key."""
RHO = 2.0
"""A layer can have up to this many times the mean rank; the paper's and PEFT's default."""


def equal_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """The largest rank on all layers within the budget (QLoRA, Dettmers et al. 2023); the rest buys one more for some.

    Those are sharded over the depth as in ``layerlens.optimization.uniform``, so that arms are compared at equal
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
    """The same on query and value projections (Hu et al. 2022).

    Raises:
        ConfigurationError: there are no layers with these roles.
    """
    chosen = [layer for layer in layers if layer.role in QUERY_VALUE_ROLES]
    if not chosen:
        raise ConfigurationError("baseline lora-qv: no query and value projections were recognised in this model")
    return equal_ranks(chosen, budget, measured, seed)


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


def gora_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """GoRA's ranks (He et al. 2025, arXiv:2502.12171, section 3.2), without its initialisation.

    A layer's importance is mean |W ⊙ G|. Its share of all importance is its share of Σ √(n_in + n_out)·r, and r is kept
    between half and four times the reference rank, which here is the mean rank that the budget buys. The paper rounds
    every rank by itself and may pass the budget; here the scale is the largest with which all ranks fit.
    """
    reference = budget / sum(map(rank_cost, layers))
    weights = {
        layer.name: measured["weight_gradient"][layer.name] / math.sqrt(layer.n_in + layer.n_out) for layer in layers
    }
    least, most = math.floor(reference / 2), max(1, math.ceil(4 * reference))
    return proportional_ranks(layers, weights, budget, least=least, most=most)


def gradient_norm_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """Rank in proportion to the norm of the mean gradient."""
    return proportional_ranks(layers, measured["gradient_norm"], budget)


def fisher_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """Rank in proportion to the trace of the empirical Fisher information."""
    return proportional_ranks(layers, measured["fisher_trace"], budget)


def random_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """Shares of the budget that are uniform on the simplex (a Dirichlet of ones): what any allocation has to beat.

    Every way to divide the parameters is as likely as every other, at any budget; drawing rank by rank would draw near
    equal ranks where the budget is large.
    """
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(layers)))
    weights = {layer.name: share / rank_cost(layer) for layer, share in zip(layers, shares.tolist(), strict=True)}
    return proportional_ranks(layers, weights, budget)


def eva_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """The N components of all layers together that explain the largest shares of their inputs' variance: EVA's ranks
    (Paischer et al. 2024, arXiv:2410.07170).

    EVA redistributes N = r·layers ranks, at most round(ρ·r) to a layer (``peft.tuners.lora.eva``, by its authors). Its
    budget is a number of ranks, and layers cost differently: here N is the largest number whose redistribution stays
    within ``budget`` parameters, with r = N / layers.
    """
    for total in range(budget // min(layer.n_in + layer.n_out for layer in layers), 0, -1):
        ranks = redistributed(layers, measured, total)
        if params_of(layers, ranks) <= budget:
            return ranks
    return {}


def redistributed(layers: Sequence[LayerSpec], measured: Measured, total: int) -> Ranks:
    """Layer -> rank of the best ``total`` components; equal shares go to the layer that comes first."""
    most = max(1, round(RHO * total / len(layers)))
    shares = [np.asarray(measured["explained_variance"][layer.name])[:most] for layer in layers]
    owners = np.repeat(np.arange(len(layers)), [len(each) for each in shares])
    best = owners[np.argsort(-np.concatenate(shares), kind="stable")[:total]]
    return {layers[index].name: count for index, count in sorted(Counter(best.tolist()).items())}


UNIFORM = RankRule("one LoRA rank on every Linear", equal_ranks)
UNIFORM_QV = RankRule("one LoRA rank on query and value", equal_query_value_ranks)
GORA = RankRule("LoRA ranks by weight times gradient (GoRA)", gora_ranks, ("weight_gradient",))
GRADIENT_NORM = RankRule("LoRA ranks in proportion to the gradient's norm", gradient_norm_ranks, ("gradient_norm",))
FISHER = RankRule("LoRA ranks in proportion to the Fisher trace", fisher_ranks, ("fisher_trace",))
RANDOM = RankRule("LoRA ranks drawn at random", random_ranks)
EVA = RankRule(
    "LoRA ranks by the variance that the inputs' components explain (EVA)", eva_ranks, ("explained_variance",)
)
