"""What merging into quantized weights loses: these are rounded again, and training changes little."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from layerlens.integrations.quantized import is_quantized

PROBES = 64
"""Random inputs that each layer's outputs are compared on."""


def why_not_merged(model: torch.nn.Module) -> str:
    """The first layer whose quantized weight PEFT cannot change; "" where there is none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in _adapted(model).items():
        if type(layer).merge is BaseTunerLayer.merge:
            base = type(layer.get_base_layer()).__name__
            return f"PEFT cannot merge into the quantized weight of {name} ({base})"
    return ""


def merge_with_cost(model: torch.nn.Module, merge: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """What ``merge()`` gives; where there is quantization, warns of how much of what was trained rounding takes."""
    layers = _adapted(model)
    wanted = {name: _trained_outputs(layer) for name, layer in layers.items()}
    if not layers:
        return merge()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to .* may get different generations")
        merged = merge()
    lost = {name: _lost(merged.get_submodule(name), *outputs) for name, outputs in wanted.items()}
    worst = max(lost, key=lambda name: lost[name])
    warnings.warn(
        f"merging rounds {len(lost)} quantized layers again, and their outputs then differ from the trained ones by "
        f"{sorted(lost.values())[len(lost) // 2]:.0%} of its size (median; {lost[worst]:.0%} in {worst}). To merge "
        "without this loss, load the adapter onto the base model in 16 bits (check_fingerprint=False), merge there, "
        "and quantize the result",
        stacklevel=2,
    )
    return merged


def _adapted(model: Any) -> dict[str, Any]:
    """PEFT's layers around quantized ones, by their names in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {name: layer for name, layer in found.items() if is_quantized(layer.get_base_layer())}


def _trained_outputs(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(inputs, outputs with what was trained, outputs without)."""
    trained = next(x for x in layer.parameters() if x.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, layer.in_features, generator=generator).to(trained)
    with torch.no_grad():
        return probes, layer(probes), layer.get_base_layer()(probes)


def _lost(merged: torch.nn.Module, probes: torch.Tensor, trained: torch.Tensor, base: torch.Tensor) -> float:
    """‖merged − trained‖ / ‖trained − base‖; 0 where nothing was trained and nothing is lost."""
    with torch.no_grad():
        missed = float((merged(probes) - trained).double().norm())
    return missed / max(float((trained - base).double().norm()), 1e-30) if missed else 0.0
