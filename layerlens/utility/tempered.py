"""Utility models between the gradient energy and even spreading: rank in proportion to its root, not to itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerlens.models import ModelSpec, ModelStatistics, Option
from layerlens.utility.model import UtilityModel
from layerlens.utility.signal import SIGNAL, marginal_parameters, root_law, uniform


def tempered(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """(max(0, ‖M‖² − noise) · scale)^¼ · √rank: the geometric mean of ``signal`` and of even spreading (``uniform``).

    With √rank, the optimum under one budget has rank ∝ (score / cost)² in each layer: ``signal`` gives rank in
    proportion to the energy itself, which spans decades over layers, and ``tempered`` to its root
    (docs/decisions/utility.md has the measurements of both).
    """
    return np.sqrt(root_law(spec, statistics, options, "signal") * uniform(spec, statistics, options))


def tempered_energy(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """(‖M‖² · scale)^¼ · √rank: ``tempered`` with the sampling noise left in.

    The root tames what noise adds to small energies, no layer is taken for nothing at all, and other samples give
    nearly the same order of layers.
    """
    return np.sqrt(root_law(spec, statistics, options, "energy") * uniform(spec, statistics, options))


def tempered_log(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """(‖M‖² · scale)^¼ · size · log(1 + rank), size = trainable parameters of one rank more.

    Under one budget of parameters the best ranks are rank + 1 ∝ (‖M‖² · scale)^¼, whatever the layers' sizes: little
    goes to the few layers with the largest gradients, and the more there is the more alike the ranks become. The laws
    with √rank and without the size give wide layers rank ∝ 1/size² instead, and were worse than uniform LoRA where
    there was room for rank 4 everywhere (docs/decisions/utility.md). Why size: Adam moves every parameter alike, so a
    rank of a larger layer moves the loss by more.
    """
    layers = {layer.name: layer for layer in spec.layers}
    size = np.array([marginal_parameters(layers[option.layer], option.method) for option in options])
    rank = np.array([option.rank for option in options], dtype=np.float64)
    energy_root = root_law(spec, statistics, options, "energy") / np.sqrt(np.maximum(rank, 1.0))
    return np.sqrt(energy_root) * size * np.log1p(rank)


ENERGY = ("gradient", "input_scale")
TEMPERED = UtilityModel("tempered", tempered, "relative gain (fourth root of the noise-corrected energy)", SIGNAL.needs)
TEMPERED_ENERGY = UtilityModel(
    "tempered_energy", tempered_energy, "relative gain (fourth root of the gradient energy)", ENERGY
)
TEMPERED_LOG = UtilityModel(
    "tempered_log", tempered_log, "relative gain (fourth root of the gradient energy × parameters)", ENERGY
)
