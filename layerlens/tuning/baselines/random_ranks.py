"""LoRA ranks drawn at random: what any allocation has to beat."""

from __future__ import annotations

import numpy as np

from layerlens.tuning.baselines.interface import BaselineRequest, Prepared
from layerlens.tuning.baselines.plans import layers_with, plan, planned, proportional_ranks


def random_ranks(request: BaselineRequest) -> Prepared:
    """Shares of the budget uniform on the simplex (Dirichlet of ones), drawn from the seed."""
    layers = layers_with(request, "lora")
    shares = np.random.default_rng(request.seed).dirichlet(np.ones(len(layers)))
    weights = {
        layer.name: share / (layer.n_in + layer.n_out) for layer, share in zip(layers, shares.tolist(), strict=True)
    }
    ranks = proportional_ranks(layers, weights, request.budget)
    return planned(request, plan(request, {name: ("lora", rank) for name, rank in ranks.items()}))
