"""EVA's ranks (Paischer et al. 2024, arXiv:2410.07170): to layers whose inputs have the most telling components."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from layerlens.models import LayerSpec
from layerlens.rank_rules.rule import Measured, RankRule, Ranks, params_of

RHO = 2.0
"""A layer can have up to this many times the mean rank; the paper's and PEFT's default."""


def eva_ranks(layers: Sequence[LayerSpec], budget: int, measured: Measured, seed: int) -> Ranks:
    """The N components of all layers together that explain the largest shares of their inputs' variance.

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


EVA = RankRule(
    "LoRA ranks by the variance that the inputs' components explain (EVA)", eva_ranks, ("explained_variance",)
)
