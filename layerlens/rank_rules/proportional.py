"""Ranks in proportion to a figure of each layer: GoRA, gradient norm, Fisher trace, and shares drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from layerlens.models import LayerSpec
from layerlens.rank_rules.rule import Measured, RankRule, Ranks, proportional_ranks, rank_cost


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


GORA = RankRule("LoRA ranks by weight times gradient (GoRA)", gora_ranks, ("weight_gradient",))
GRADIENT_NORM = RankRule("LoRA ranks in proportion to the gradient's norm", gradient_norm_ranks, ("gradient_norm",))
FISHER = RankRule("LoRA ranks in proportion to the Fisher trace", fisher_ranks, ("fisher_trace",))
RANDOM = RankRule("LoRA ranks drawn at random", random_ranks)
