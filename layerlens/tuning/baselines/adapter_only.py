"""Bottleneck adapters of one width after every module that writes to the residual stream (Houlsby et al. 2019)."""

from __future__ import annotations

from layerlens.tuning.baselines.interface import BaselineRequest, Prepared
from layerlens.tuning.baselines.plans import layers_with, plan, planned, uniform_size


def adapter_only(request: BaselineRequest) -> Prepared:
    """The largest width within the budget."""
    layers = layers_with(request, "adapter")
    size = uniform_size(layers, "adapter", request.budget)
    return planned(request, plan(request, {layer.name: ("adapter", size) for layer in layers}))
