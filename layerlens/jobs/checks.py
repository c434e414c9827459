"""Predicted against measured: what the manifest says, held against the real model with its options injected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from layerlens.config import OptimizationConfig
from layerlens.cost import OPTIMIZER_STATE
from layerlens.cost.measure import forward_ms
from layerlens.integrations.transformers import without_cache
from layerlens.models import Manifest
from layerlens.profiling.footprint import count_saved_bytes, dense_inputs
from layerlens.tasks.losses import output_tensors
from layerlens.tuning import apply
from layerlens.utils.progress import Progress

TIMING_SECONDS = 0.5


def check_manifest(
    model: torch.nn.Module,
    manifest: Manifest,
    inputs: dict[str, torch.Tensor],
    config: OptimizationConfig,
    progress: Progress,
    factors: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Inject the manifest's options into ``model`` (which keeps them) and measure what was predicted.

    Args:
        model: the frozen base model, in evaluation mode.
        manifest: what to check.
        inputs: a real batch; its tokens fill the batch of the latency profile.
        config: latency profile and optimiser.
        progress: told of the steps.
        factors: LoRA's first A by layer, where it is measured.

    Returns:
        resource -> {"predicted", "measured", "relative_error"}, and "step_zero_max_abs_delta", the largest change
        of any logit by the injection (0 is demanded of every option).
    """
    profile = config.latency_profile
    batch = dense_inputs(inputs, profile.sequence_length, samples=profile.batch_size)
    with progress.stage("Checking predictions", total=3) as advance:
        before = _logits(model, inputs)
        base_flops = _forward_flops(model, batch)
        base_ms = forward_ms(model, batch, seconds=TIMING_SECONDS)
        advance(1)
        model = apply(model, manifest, factors=factors)
        model.eval()
        delta = float((_logits(model, inputs) - before).abs().max())
        flops = _forward_flops(model, batch) - base_flops
        latency_ms = forward_ms(model, batch, seconds=TIMING_SECONDS)
        advance(1)
        vram_gb, trained = _step_memory(model, batch, manifest.choice.head_modules, config)
        advance(1)
    uses = {use.resource: use for use in manifest.resources}
    return {
        "step_zero_max_abs_delta": delta,
        "trainable_params": _compare(uses["trainable_params"].total, trained),
        "flops": _compare(uses["flops"].total, flops),
        "vram_gb": _compare(uses["vram_gb"].total, vram_gb),
        "latency_ms": _compare(uses["latency_ms"].total, latency_ms),
        "base_latency_ms": _compare(uses["latency_ms"].base, base_ms),
    }


def _compare(predicted: float, measured: float) -> dict[str, float]:
    error = (predicted - measured) / measured if measured else 0.0
    return {"predicted": predicted, "measured": measured, "relative_error": error}


def _logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([part.flatten() for part in output_tensors(model(**inputs))])


def _forward_flops(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops())


def _step_memory(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], heads: tuple[str, ...], config: OptimizationConfig
) -> tuple[float, int]:
    """(GB that one training step holds, trained parameters), the task head left out of both.

    Counted, not sampled: the bytes of all weights, of what autograd keeps between forward and backward, and of
    gradients and optimiser state of what trains.
    """
    for head in heads:
        model.get_submodule(head).requires_grad_(False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with without_cache(model):  # as trainers have it
        kept = count_saved_bytes(
            model, lambda: torch.cat([part.flatten() for part in output_tensors(model(**inputs))]).sum()
        )
    state_bytes = 4 * (1 + OPTIMIZER_STATE[config.optimizer]) * trained
    return 1e-9 * (weight_bytes + kept + state_bytes), trained
