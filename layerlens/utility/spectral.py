"""Utility models that read the measured gradient matrices (DESIGN section 5).

``tempered``, ``signal``, ``gradient`` and ``uniform`` share the concave law √rank, which spreads rank over layers; they
differ in what they multiply it with. ``tempered_log`` counts the sizes of layers and saturates faster. ``whitened`` is
the quadratic model with K-FAC curvature, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerlens.models import LORA, NONE, LayerSpec, MethodStatistics, ModelSpec, ModelStatistics, Option
from layerlens.registry import METHODS


def signal(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """√(max(0, ‖M‖² − noise) · scale) · √rank: the gradient energy that is not sampling noise.

    Subtracting the noise is what makes the score predict measured gains (Spearman 0.77-0.86, against 0.4-0.5 without),
    and √rank is what makes the allocation good (DESIGN section 5).
    """
    return _root_law(spec, statistics, options, "signal")


def tempered(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """(max(0, ‖M‖² − noise) · scale)^¼ · √rank: the geometric mean of ``signal`` and of even spreading (``uniform``).

    With √rank, the optimum under one budget has rank ∝ (score / cost)² in each layer: ``signal`` gives rank in
    proportion to the energy itself, which spans decades over layers, and ``tempered`` to its root (docs/decisions.md,
    Utility, has what the evaluation says of both).
    """
    return np.sqrt(_root_law(spec, statistics, options, "signal") * uniform(spec, statistics, options))


def tempered_energy(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """(‖M‖² · scale)^¼ · √rank: ``tempered`` with the sampling noise left in.

    The root tames what noise adds to small energies, no layer is taken for nothing at all, and other samples give
    nearly the same order of layers.
    """
    return np.sqrt(_root_law(spec, statistics, options, "energy") * uniform(spec, statistics, options))


def tempered_log(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """(‖M‖² · scale)^¼ · size · log(1 + rank), size = trainable parameters of one rank more.

    Under one budget of parameters the best ranks are rank + 1 ∝ (‖M‖² · scale)^¼, whatever the layers' sizes: little
    goes to the few layers with the largest gradients, and the more there is the more alike the ranks become. The laws
    with √rank and without the size give wide layers rank ∝ 1/size² instead, and were worse than uniform LoRA where
    there was room for rank 4 everywhere (docs/decisions.md, Utility). Why size: Adam moves every parameter alike, so a
    rank of a larger layer moves the loss by more.
    """
    layers = {layer.name: layer for layer in spec.layers}
    size = np.array([marginal_parameters(layers[option.layer], option.method) for option in options])
    rank = np.array([option.rank for option in options], dtype=np.float64)
    energy_root = _root_law(spec, statistics, options, "energy") / np.sqrt(np.maximum(rank, 1.0))
    return np.sqrt(energy_root) * size * np.log1p(rank)


def gradient(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """√(‖M‖² · scale) · √rank: the plain gradient energy, sampling noise included; kept for comparison."""
    return _root_law(spec, statistics, options, "energy")


def uniform(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option]) -> np.ndarray:
    """√rank for every layer and method: spreads the budget evenly, whatever was measured."""
    return np.sqrt(np.array([option.rank for option in options], dtype=np.float64))


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
            values = np.maximum(by_layer[option.layer].by_method[option.method].spectrum, 0.0)
            directions = METHODS[option.method].directions(layers[option.layer], option.rank)
            utility[index] = 0.5 * float(values[:directions].sum())
    return utility


def _root_law(spec: ModelSpec, statistics: ModelStatistics, options: Sequence[Option], energy_name: str) -> np.ndarray:
    scale = input_scales(spec, statistics)
    by_layer = statistics.by_name()
    utility = np.zeros(len(options))
    for index, option in enumerate(options):
        if option.method != NONE:
            energy: float = getattr(by_layer[option.layer].by_method[option.method], energy_name)
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
            lora_inputs.setdefault(layer.block, []).append(_input_scale(by_layer[layer.name].by_method[LORA]))
    factors = {}
    for layer in spec.layers:
        measured = by_layer[layer.name].by_method
        block = lora_inputs.get(layer.block) or [1.0]
        for method in layer.methods:
            reference = _input_scale(measured[LORA]) if LORA in measured else float(np.mean(block))
            own = _input_scale(measured[method])
            as_it_is = not METHODS[method].absorbs_input_scale or own == 0.0
            factors[layer.name, method] = 1.0 if as_it_is else reference / own
    return factors


def _input_scale(measured: MethodStatistics) -> float:
    assert measured.input_mean_square is not None, "the registry refuses statistics without input_scale"
    return measured.input_mean_square
