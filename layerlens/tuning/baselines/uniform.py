"""One LoRA rank everywhere: on every Linear (QLoRA, Dettmers et al. 2023) or on query and value (Hu et al. 2022)."""

from __future__ import annotations

from layerlens.exceptions import ConfigurationError
from layerlens.tuning.baselines.interface import BaselineRequest, Prepared
from layerlens.tuning.baselines.plans import layers_with, plan, planned, uniform_size

QUERY_VALUE_ROLES = ("query", "value", "query_key_value")  # a fused projection has both, and the key


def uniform_all_linear(request: BaselineRequest) -> Prepared:
    """The largest rank within the budget on every layer that can take LoRA."""
    layers = layers_with(request, "lora")
    rank = uniform_size(layers, "lora", request.budget)
    return planned(request, plan(request, {layer.name: ("lora", rank) for layer in layers}))


def uniform_query_value(request: BaselineRequest) -> Prepared:
    """The largest rank within the budget on query and value projections.

    Raises:
        ConfigurationError: the model has no layers with these roles.
    """
    layers = tuple(layer for layer in layers_with(request, "lora") if layer.role in QUERY_VALUE_ROLES)
    if not layers:
        raise ConfigurationError("baseline lora-qv: no query and value projections were recognised in this model")
    rank = uniform_size(layers, "lora", request.budget)
    fused = any(layer.role == "query_key_value" for layer in layers)
    note = "the projection is fused, so keys are adapted too" if fused else ""
    return planned(request, plan(request, {layer.name: ("lora", rank) for layer in layers}), note=note)


def uniform_rslora(request: BaselineRequest) -> Prepared:
    """As ``uniform_all_linear``, scaled by alpha/√r (Kalajdzievski 2023, arXiv:2312.03732)."""
    layers = layers_with(request, "lora")
    rank = uniform_size(layers, "lora", request.budget)
    choice = {layer.name: ("lora", rank) for layer in layers}
    return planned(request, plan(request, choice, use_rslora=True))
