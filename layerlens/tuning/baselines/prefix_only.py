"""Gated prefixes of one length in every attention block."""

from __future__ import annotations

from layerlens.tuning.baselines.interface import BaselineRequest, Prepared
from layerlens.tuning.baselines.plans import layers_with, plan, planned, uniform_size


def prefix_only(request: BaselineRequest) -> Prepared:
    """The largest length within the budget."""
    layers = layers_with(request, "prefix")
    size = uniform_size(layers, "prefix", request.budget)
    return planned(request, plan(request, {layer.name: ("prefix", size) for layer in layers}))
