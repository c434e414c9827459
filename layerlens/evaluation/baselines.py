"""Rank rules that others use, at a budget of trainable parameters: layer -> rank, layers without rank left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from layerlens.evaluation.gradients import LayerGradient
from layerlens.models import LayerSpec

Ranks = dict[str, int]


def cost(layer: LayerSpec) -> int:
    """Parameters of rank 1."""
    return layer.n_in + layer.n_out


def n_params(layers: Sequence[LayerSpec], ranks: Mapping[str, int]) -> int:
    """Trainable parameters of an allocation."""
    return sum(ranks.get(layer.name, 0) * cost(layer) for layer in layers)


def uniform(layers: Sequence[LayerSpec], budget: int, roles: Sequence[str] = ()) -> Ranks:
    """The largest equal rank for all layers, or for those with one of the ``roles``, that fits.

    What is left of the budget goes to single layers, spread evenly over the depth.
    """
    chosen = [layer for layer in layers if not roles or layer.role in roles]
    rank = budget // sum(cost(layer) for layer in chosen)
    ranks = {layer.name: rank for layer in chosen}
    left = budget - n_params(layers, ranks)
    mean_cost = sum(cost(layer) for layer in chosen) / len(chosen)
    stride = max(1, math.floor(len(chosen) / max(1.0, left / mean_cost)))
    for layer in [*chosen[stride - 1 :: stride], *chosen]:
        if cost(layer) <= left and ranks[layer.name] == rank:
            ranks[layer.name] += 1
            left -= cost(layer)
    return {name: value for name, value in ranks.items() if value}


def proportional(
    layers: Sequence[LayerSpec], budget: int, score: Mapping[str, float], *, per_root_size: bool = False
) -> Ranks:
    """Ranks in proportion to the score (largest remainders), at most half of the smaller side.

    With ``per_root_size`` the score is a share of Σ √(n_in + n_out)·rank instead, as in GoRA.
    """
    size = {layer.name: math.sqrt(cost(layer)) if per_root_size else 1.0 for layer in layers}
    most = {layer.name: min(layer.n_in, layer.n_out) // 2 for layer in layers}
    low, high = 0.0, 1e12
    for _ in range(200):
        factor = math.sqrt(max(low, 1e-12) * high)
        ranks = {name: min(most[name], math.floor(factor * value / size[name] + 0.5)) for name, value in score.items()}
        low, high = (factor, high) if n_params(layers, ranks) <= budget else (low, factor)
    ranks = {name: min(most[name], math.floor(low * value / size[name] + 0.5)) for name, value in score.items()}
    return _filled(layers, budget, ranks, {name: value / size[name] for name, value in score.items()})


def _filled(layers: Sequence[LayerSpec], budget: int, ranks: Ranks, score: Mapping[str, float]) -> Ranks:
    """One rank more for the best layers that still fit."""
    left = budget - n_params(layers, ranks)
    for layer in sorted(layers, key=lambda layer: -score[layer.name]):
        if cost(layer) <= left and score[layer.name] > 0.0:
            ranks[layer.name] += 1
            left -= cost(layer)
    return {name: rank for name, rank in ranks.items() if rank}


def eva(layers: Sequence[LayerSpec], budget: int, measured: Mapping[str, LayerGradient]) -> Ranks:
    """EVA (Paischer et al. 2024): components of the inputs' PCA, all layers together, by explained variance ratio."""
    candidates = []
    for layer in layers:
        values = torch.linalg.eigvalsh(measured[layer.name].input_covariance.double()).flip(0).clamp(min=0.0)
        ratios = values / values.sum()
        candidates += [(-float(ratio), layer) for ratio in ratios[: min(layer.n_in, layer.n_out) // 2]]
    ranks: Ranks = dict.fromkeys((layer.name for layer in layers), 0)
    left = budget
    for _, layer in sorted(candidates, key=lambda candidate: candidate[0]):
        if cost(layer) <= left:
            ranks[layer.name] += 1
            left -= cost(layer)
    return {name: rank for name, rank in ranks.items() if rank}


def eva_inits(measured: Mapping[str, LayerGradient], ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """EVA's A: the leading principal directions of the inputs, float [rank, n_in]."""
    return {
        name: torch.linalg.eigh(measured[name].input_covariance.double())[1].flip(1)[:, :rank].T.float().contiguous()
        for name, rank in ranks.items()
    }


def gradient_svd_inits(measured: Mapping[str, LayerGradient], ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """LoRA-GA's A (Wang et al. 2024): right singular vectors of the mean gradient, orthonormal, float [rank, n_in]."""
    return {
        name: torch.linalg.svd(measured[name].gradient.double(), full_matrices=False)[2][:rank].float().contiguous()
        for name, rank in ranks.items()
    }


def gora(layers: Sequence[LayerSpec], budget: int, measured: Mapping[str, LayerGradient]) -> Ranks:
    """GoRA's ranks (He et al. 2025): importance mean |W ∘ G|, shares of Σ √(n_in + n_out)·rank."""
    score = {layer.name: float((measured[layer.name].weight * measured[layer.name].gradient).abs().mean())
             for layer in layers}  # fmt: skip
    return proportional(layers, budget, score, per_root_size=True)


def random_ranks(layers: Sequence[LayerSpec], budget: int, seed: int) -> Ranks:
    """Rank 1 on layers drawn one after the other, as long as they fit."""
    generator = np.random.default_rng(seed)
    ranks: Ranks = dict.fromkeys((layer.name for layer in layers), 0)
    left = budget
    while fitting := [layer for layer in layers if cost(layer) <= left]:
        drawn = fitting[generator.integers(len(fitting))]
        ranks[drawn.name] += 1
        left -= cost(drawn)
    return {name: rank for name, rank in ranks.items() if rank}
