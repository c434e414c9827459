"""The fourth stage: what the manifest predicts, compared with the real model with its options injected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from layerlens.config import OptimizationConfig
from layerlens.cost.measure import forward_ms, here, peak_bytes, time_ms, training_step
from layerlens.integrations.flops import FlopCounter
from layerlens.integrations.peft import base_of
from layerlens.integrations.placement import offloaded, sharded
from layerlens.integrations.quantized import weight_bytes
from layerlens.integrations.transformers import without_cache
from layerlens.jobs.decision import Decision
from layerlens.jobs.job import Job, Warnings
from layerlens.jobs.load import Loaded
from layerlens.jobs.recorded_step import UNRECORDABLE, step_of
from layerlens.models import Manifest
from layerlens.profiling.footprint import dense_inputs
from layerlens.tasks.losses import output_tensors
from layerlens.tuning import apply
from layerlens.utils.progress import Progress

TIMING_SECONDS = 0.5
TIMING_NOISE = 0.05
"""Relative error that two timings of the same thing have on an idle machine."""
Factors = Mapping[str, torch.Tensor] | None
"""LoRA's first A by layer, where it is measured."""


def check(job: Job, loaded: Loaded, decision: Decision, factors: Factors) -> dict[str, Any]:
    """What the manifest predicts compared with the model (which keeps the options); says what does not hold.

    Returns:
        the figures of ``check_manifest``, where the model is here whole, and those of the trainings.
    """
    model, manifest, warnings = loaded.pretrained.model, decision.manifest, job.warnings
    measured: dict[str, Any] = {}
    with job.clock.stage("check"):
        if not job.config.optimization.check_predictions:
            pass
        elif loaded.pretrained.streamed is not None:
            warnings.add(
                "predictions are not checked, because the whole model was never in memory; run `layerlens evaluate "
                "MANIFEST --costs` on a machine that can hold it"
            )
        elif sharded(model) or offloaded(model):
            warnings.add("the model's weights are sharded or on disk, so predictions were not checked on it")
        else:
            profile = job.config.optimization.latency_profile
            if not here(profile.device_type):
                machine = "has no GPU" if profile.device_type == "gpu" else "computes on its GPU"
                warnings.add(
                    f"memory and times are predicted for a {profile.device_type} and not measured: this machine "
                    f"{machine}"
                )
            measured = check_manifest(loaded, manifest, job.config.optimization, job.progress, factors)
            _warn_of_overrun(manifest, measured, warnings)
        if job.config.profiling.proxies.options:
            _warn_of_calibration(manifest, decision.trained, warnings)
    return measured | decision.trained


def check_manifest(
    loaded: Loaded,
    manifest: Manifest,
    config: OptimizationConfig,
    progress: Progress,
    factors: Factors = None,
) -> dict[str, Any]:
    """Inject the manifest's options into the loaded model (which keeps them) and measure what was predicted.

    Args:
        loaded: the frozen base model, in evaluation mode, and its data: a real sample fills the batch of the profile.
        manifest: what to check.
        config: latency profile and optimiser.
        progress: reports the steps.
        factors: LoRA's first A by layer, where it is measured.

    Returns:
        resource -> {"predicted", "measured", "relative_error"}, and "step_zero_max_abs_delta", the largest change
        of any logit by the injection (0 is demanded of every option). Memory and times are there only where the device
        is the one that they are predicted for.
    """
    profile, model = config.latency_profile, loaded.pretrained.model
    inputs = loaded.batches[-1].inputs
    batch = dense_inputs(inputs, profile.sequence_length, samples=profile.batch_size, model=model)
    timed = here(profile.device_type)
    uses = {use.resource: use for use in manifest.resources}
    with progress.stage("Checking predictions", total=3) as advance:
        before = _logits(model, inputs)
        base_flops = _forward_flops(model, batch)
        base_ms = forward_ms(model, batch, seconds=TIMING_SECONDS, warm=True) if timed else 0.0
        advance(1)
        model = apply(model, manifest, factors=factors)
        model.eval()
        delta = float((_logits(model, inputs) - before).abs().max())
        flops = _forward_flops(model, batch) - base_flops
        latency_ms = forward_ms(model, batch, seconds=TIMING_SECONDS, warm=True) if timed else 0.0
        advance(1)
        found = {
            "step_zero_max_abs_delta": delta,
            "trainable_params": _compare(uses["trainable_params"].total, _trained(model, manifest.model.new_heads)),
            "flops": _compare(uses["flops"].total, flops),
        }
        if timed:
            found["latency_ms"] = _compare(uses["latency_ms"].total, latency_ms)
            found["base_latency_ms"] = _compare(uses["latency_ms"].base, base_ms)
            for resource, figure in _step(model, loaded, manifest, config).items():
                if resource in uses:
                    found[resource] = _compare(uses[resource].total, figure)
        advance(1)
    return found


def _trained(model: torch.nn.Module, heads: tuple[str, ...]) -> int:
    """Parameters that train, those of the task head left out; PEFT trains a copy of it."""
    head = {id(weight) for name in heads for weight in base_of(model).get_submodule(name).parameters()}
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad and id(weight) not in head)


def _step(model: torch.nn.Module, loaded: Loaded, manifest: Manifest, config: OptimizationConfig) -> dict[str, float]:
    """Peak memory in GB and time of a training step, task head and loss included, as far as the step can be made."""
    if not any(weight.requires_grad for weight in model.parameters()):  # nothing was worth choosing
        return {}
    profile = config.latency_profile
    heads = manifest.choice.head_modules
    of = replace(step_of(loaded, heads, profile.sequence_length, real=True), model=model)
    model.train()
    try:
        with without_cache(model):
            for loss in of.losses():
                step, state = training_step(model, partial(loss, profile.batch_size), config.optimizer)
                try:
                    step()
                except UNRECORDABLE:  # with this loss
                    continue
                memory = 1e-9 * (weight_bytes(model) + state + peak_bytes(step))
                return {"vram_gb": memory, "step_ms": time_ms(step, seconds=TIMING_SECONDS, warm=True)}
        return {}
    finally:
        model.zero_grad()
        model.eval()


def _compare(predicted: float, measured: float) -> dict[str, float]:
    error = (predicted - measured) / measured if measured else 0.0
    return {"predicted": predicted, "measured": measured, "relative_error": error}


def _logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([part.flatten() for part in output_tensors(model(**inputs))])


def _forward_flops(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), FlopCounter(model) as counter:
        model(**inputs)
    return int(counter.get_total_flops())


def _warn_of_overrun(manifest: Manifest, measured: dict[str, Any], warnings: Warnings) -> None:
    """Say which measured figures are above their budgets, and when the machine was too busy to time."""
    slow, base = (measured.get(name, {}).get("measured", 0.0) for name in ("latency_ms", "base_latency_ms"))
    busy = slow < (1 - TIMING_NOISE) * base
    if busy:
        warnings.add(
            "latency: the model was faster with its options than without, so this machine was too busy to time it; run "
            "again when it is idle"
        )
    for use in manifest.resources:
        if use.resource not in measured or (use.resource == "latency_ms" and busy):
            continue
        found = measured[use.resource]["measured"]
        if use.budget is not None and found > use.budget:
            warnings.add(
                f"{use.resource}: measured {found:.4g} on this machine, above the budget of {use.budget:g} although "
                "the prediction is within it; if this is the device that you budget for, set its figures in "
                "optimization.latency_profile"
            )


def _warn_of_calibration(manifest: Manifest, joint: dict[str, Any], warnings: Warnings) -> None:
    """Say when the proxies speak against the utility model, or for treating all layers alike."""
    found = manifest.predicted.calibration
    assert found is not None
    if found.proxies < found.planned:
        warnings.add(
            f"profiling.proxies: the time limit ended after {found.proxies} of {found.planned} options; run again to "
            "continue"
        )
    interval = found.spearman_interval
    if interval is not None and interval[0] <= 0.0:
        warnings.add(
            f"utility model {manifest.utility_model!r} did not clearly rank the {found.proxies} trained options "
            f"(Spearman {found.spearman:.2f}, 95 % from {interval[0]:.2f} to {interval[1]:.2f}); train more "
            "profiling.proxies.options or steps, or try another profiling.utility_model"
        )
    over = joint["loss_drop_over_uniform"]
    if over["measured"] < -2.0 * over["standard_error"]:
        warnings.add(
            f"equal ranks on all layers gained more in the same steps, by {-over['measured']:.4g} ± "
            f"{over['standard_error']:.2g} per sample; set profiling.utility_model: uniform to choose them"
        )
