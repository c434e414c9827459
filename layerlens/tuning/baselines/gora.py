"""LoRA ranks by weight times gradient, as in GoRA (He et al. 2025, arXiv:2502.12171), without its initialisation."""

from __future__ import annotations

import math

from layerlens.exceptions import ConfigurationError
from layerlens.tuning.baselines.interface import BaselineRequest, Prepared
from layerlens.tuning.baselines.plans import layers_with, plan, planned, proportional_ranks, uniform_size

GRADIENT_BATCHES = 32


def gora_ranks(request: BaselineRequest) -> Prepared:
    """Rank in proportion to mean|W ⊙ G| / √(n_in + n_out), between half and four times the uniform rank.

    G is the mean gradient of the first batches.

    Raises:
        ConfigurationError: no batches were given.
    """
    if not request.batches:
        raise ConfigurationError("baseline gora: needs training batches to measure gradients on")
    layers = layers_with(request, "lora")
    reference = uniform_size(layers, "lora", request.budget)
    importance = _importance(request, tuple(layer.name for layer in layers))
    weights = {layer.name: importance[layer.name] / math.sqrt(layer.n_in + layer.n_out) for layer in layers}
    ranks = proportional_ranks(
        layers, weights, request.budget, least=max(1, reference // 2), most=max(2, 4 * reference)
    )
    return planned(request, plan(request, {name: ("lora", rank) for name, rank in ranks.items()}))


def _importance(request: BaselineRequest, names: tuple[str, ...]) -> dict[str, float]:
    import torch

    model = request.model
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    model.eval().requires_grad_(False)
    weights = {name: model.get_submodule(name).get_parameter("weight").requires_grad_(True) for name in names}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    batches = request.batches[:GRADIENT_BATCHES]
    try:
        for batch in batches:
            gradients = torch.autograd.grad(request.loss(model, batch), list(weights.values()))
            for name, gradient in zip(names, gradients, strict=True):
                sums[name] += gradient / len(batches)
        return {name: float((weights[name].detach() * sums[name]).abs().mean()) for name in names}
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
