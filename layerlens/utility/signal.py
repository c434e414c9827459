"""Utility models with the law √rank, which spreads rank over layers: by gradient energy, or by nothing at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerlens.exceptions import ActivationCacheError
from layerlens.models import LORA, NONE, LayerSpec, MethodStatistics, ModelSpec, ModelStatistics, Option
from layerlens.registry import METHODS
from layerlens.utility.model import UtilityModel


def signal(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """√(max(0, ‖M‖² − noise) · scale) · √rank: the gradient energy that is not sampling noise.

    Subtracting the noise is what makes the score predict measured gains (Spearman 0.77-0.86, against 0.4-0.5 without),
    and √rank is what makes the allocation good (docs/decisions/utility.md).
    """
    return root_law(spec, statistics, options, "signal")


def gradient(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """√(‖M‖² · scale) · √rank: the plain gradient energy, sampling noise included; kept for comparison."""
    return root_law(spec, statistics, options, "energy")


def energy(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """‖M‖² · scale · √rank: the plain gradient energy itself.

    It is for whole sets of layers, whose gains are far from additive: of a set with the share s of what all layers add
    up to, √s of their gain is expected (docs/decisions/utility.md).
    """
    rank = np.array([option.rank for option in options], dtype=np.float64)
    return np.square(root_law(spec, statistics, options, "energy")) / np.sqrt(np.maximum(rank, 1.0))


def uniform(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """√rank for every layer and method: spreads the budget evenly, whatever was measured."""
    return np.sqrt(np.array([option.rank for option in options], dtype=np.float64))


def root_law(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option], energy_name: str) -> np.ndarray:
    """√(energy · scale) · √rank, the energy (``Method.energy``) from this field of ``MethodStatistics``, at least 0."""
    scale = input_scales(spec, statistics)
    by_layer, layers = statistics.by_name(), {layer.name: layer for layer in spec.layers}
    utility = np.zeros(len(options))
    for index, option in enumerate(options):
        if option.method != NONE:
            measured = by_layer[option.layer].by_method
            energy = METHODS[option.method].energy(layers[option.layer], option.rank, measured, energy_name)
            if energy is None:
                raise _lacking(option.layer, energy_name)
            factor = scale[option.layer, option.method]
            utility[index] = np.sqrt(max(0.0, energy) * factor) * np.sqrt(option.rank)
    return utility


def marginal_parameters(layer: LayerSpec, method: str) -> float:
    """Trainable parameters that one rank, unit of width or prefix pair more brings; 0 for "none"."""
    return 0.0 if method == NONE else float(METHODS[method].marginal_params(layer))


def input_scales(spec: ModelSpec, statistics: ModelStatistics) -> dict[tuple[str, str], float]:
    """What to multiply the energy of each (layer, method) with, so that methods are compared at one input scale.

    ‖Σ d zᵀ‖² grows with the scale of z, but the trained down-projection of an adapter, or the keys of a prefix, absorb
    any scale. So the inputs of adapters (module outputs y) and prefixes (1, q/√d_head) are taken at the mean square
    that LoRA's input h has: of the same layer for an adapter, of its block's layers for a prefix. A method that absorbs
    no scale, as LoRA, has factor 1.
    """
    by_layer = statistics.by_name()
    lora_inputs: dict[int | None, list[float]] = {}
    for layer in spec.layers:
        if LORA in layer.methods:
            lora_inputs.setdefault(layer.block, []).append(
                _input_scale(layer.name, by_layer[layer.name].by_method[LORA])
            )
    factors = {}
    for layer in spec.layers:
        measured = by_layer[layer.name].by_method
        block = lora_inputs.get(layer.block) or [1.0]
        for method in layer.methods:
            reference = _input_scale(layer.name, measured[LORA]) if LORA in measured else float(np.mean(block))
            own = _input_scale(layer.name, measured[method])
            as_it_is = not METHODS[method].absorbs_input_scale or own == 0.0
            factors[layer.name, method] = 1.0 if as_it_is else reference / own
    return factors


def _input_scale(layer: str, measured: MethodStatistics) -> float:
    if measured.input_mean_square is None:
        raise _lacking(layer, "input_mean_square")
    return measured.input_mean_square


def _lacking(layer: str, name: str) -> ActivationCacheError:
    return ActivationCacheError(f"{layer}: lacks {name}, which other layers have; profile the model again")


SIGNAL = UtilityModel(
    "signal",
    signal,
    "relative gain (root of the noise-corrected gradient energy)",
    ("fisher", "gradient", "input_scale"),
)
GRADIENT = UtilityModel(
    "gradient", gradient, "relative gain (root of the gradient energy)", ("gradient", "input_scale")
)
ENERGY = UtilityModel(
    "energy", energy, "gradient energy × √rank", ("gradient", "input_scale"), set_power=0.5, set_error=(0.77, 0.89)
)
"""Its error: 64 choices on five training tasks of the study on real models (benchmarks/evaluation/real_laws.py)."""
UNIFORM = UtilityModel("uniform", uniform, "relative gain (every layer equal)")
