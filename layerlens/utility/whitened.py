"""The utility model in nats: the loss drop of the quadratic model with K-FAC curvature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerlens.models import NONE, ModelSpec, ModelStatistics, Option
from layerlens.registry import METHODS
from layerlens.utility.model import UtilityModel


def whitened(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """½ Σ_{i≤rank} σ_i² of the K-FAC-whitened mean gradient, noise-corrected by split halves.

    In the quadratic model with curvature S ⊗ A, the best change of rank r lowers the loss by this much (Eckart-Young).
    Directions whose estimate is not above 0 add nothing. A prefix of p pairs has p directions in every head, so its
    spectrum (of all heads together) is read up to p times the number of heads.
    """
    by_layer = statistics.by_name()
    layers = {layer.name: layer for layer in spec.layers}
    utility = np.zeros(len(options))
    for index, option in enumerate(options):
        if option.method != NONE:
            method, measured = METHODS[option.method], by_layer[option.layer].by_method
            values = method.whitened_values(layers[option.layer], option.rank, measured)
            utility[index] = 0.5 * float(np.maximum(values, 0.0).sum())
    return utility


MODEL = UtilityModel("whitened", whitened, "predicted loss drop, nats per sample", ("whitened_spectrum",))
