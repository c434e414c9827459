"""A real training step of the model itself: how far the device's rates are off in this model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerlens.config import OptimizationConfig
from layerlens.cost import cost_table
from layerlens.cost.measure import time_ms, training_step
from layerlens.cost.rates import DeviceProfile
from layerlens.exceptions import LayerLensError
from layerlens.integrations.expert_products import plain_products
from layerlens.integrations.transformers import without_cache
from layerlens.jobs.job import Job
from layerlens.jobs.load import Loaded
from layerlens.jobs.recorded_step import UNRECORDABLE, StepOf, as_trained, step_of, time_is_minimised_or_bounded
from layerlens.methods import enumerate_options
from layerlens.models import LORA, Choice, Footprint, LoraSettings, ModelStatistics, Option
from layerlens.profiling.cache import cache_key
from layerlens.tuning import apply, unapply
from layerlens.utils.atomic import atomic_write_text
from layerlens.utils.free_memory import available_bytes

RANK = 8
SECONDS = 2.0
SHARE_OF_MEMORY = 0.5
"""Of the free memory, what the step that is timed may take."""
USUAL = (0.8, 1.25)
"""Scales that are not worth a warning: two calibrations of one device differ by a tenth."""


def with_own_step(job: Job, loaded: Loaded, statistics: ModelStatistics, heads: tuple[str, ...]) -> ModelStatistics:
    """The statistics with the device's rates scaled by one measured step of LoRA of rank 8 on every layer.

    The step is measured only if the run minimises or bounds the time of a step on this very device. The scale is kept
    in the cache, so that the same run predicts the same times again. If the step needs more than half of the free
    memory, or cannot be run, the statistics come back as they are, and a warning gives the reason.
    """
    config, step = job.config.optimization, statistics.step
    if step is None or step.rates is None or job.cache is None or not time_is_minimised_or_bounded(job.config):
        return statistics
    if loaded.pretrained.streamed is not None:
        return _unscaled(job, statistics, "its weights are read block by block")
    profile = DeviceProfile.of(step.rates)
    options = [one for one in enumerate_options(loaded.spec, {LORA: [RANK]}) if one.method == LORA]
    if not options:
        return _unscaled(job, statistics, "no layer takes LoRA")
    latency = config.latency_profile
    content = {
        "statistics": statistics.provenance.get("identity"), "device": asdict(profile), "heads": list(heads),
        "batch": [latency.batch_size, latency.sequence_length], "optimizer": config.optimizer, "rank": RANK,
    }  # fmt: skip
    path = Path(job.cache.directory) / f"step-{cache_key(content)[:16]}.json"
    scale = _kept(path)
    if scale is None:
        footprint = Footprint(0.0, 0.0, step)
        costs = cost_table(loaded.spec, footprint, options, config)
        predicted = costs.total(np.arange(len(options)))
        free_gb = 1e-9 * _free_bytes(loaded.pretrained.model)
        if predicted["vram_gb"] > SHARE_OF_MEMORY * free_gb:
            needs = f"it may need {predicted['vram_gb']:.2f} GB, and {free_gb:.2f} GB are free"
            return _unscaled(job, statistics, needs)
        try:
            with job.progress.stage("Timing a training step of this model", total=None):
                measured = _measured(step_of(loaded, heads, latency.sequence_length, real=True), options, config)
        except (*UNRECORDABLE, LayerLensError) as error:
            return _unscaled(job, statistics, (str(error).strip().splitlines() or [type(error).__name__])[0])
        scale = measured / predicted["step_ms"]
        atomic_write_text(path, json.dumps({"measured_ms": measured, "predicted_ms": predicted["step_ms"]}) + "\n")
    if not USUAL[0] <= scale <= USUAL[1]:
        job.warnings.add(
            f"a training step of this model takes {scale:.2f} times as long as the calibration of this device "
            "predicts; all step times are scaled by this (measure the device again with: layerlens calibrate)"
        )
    return replace(statistics, step=replace(step, rates=asdict(profile.scaled(scale))))


def _unscaled(job: Job, statistics: ModelStatistics, reason: str) -> ModelStatistics:
    job.warnings.add(
        f"no training step of this model was timed ({reason}); step times are predicted from the calibration of this "
        "device alone"
    )
    return statistics


def _kept(path: Path) -> float | None:
    """The scale that was measured before; None where there is none, or the file is damaged."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        scale = float(fields["measured_ms"]) / float(fields["predicted_ms"])
        return scale if 0.0 < scale < math.inf else None
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _measured(of: StepOf, options: list[Option], config: OptimizationConfig) -> float:
    """Milliseconds of a training step with LoRA on every layer. The model comes back as it was."""
    picked = {option.layer: (option.method, option.rank) for option in options}
    choice = Choice.of(picked, lora=LoraSettings(1.0), head_modules=of.heads, task=of.task.name)
    samples = config.latency_profile.batch_size
    devices = {tensor.device for tensor in of.model.parameters() if tensor.device.type == "cuda"}
    last: Exception | None = None
    with torch.random.fork_rng(devices=sorted(devices, key=str)), as_trained(of.model), plain_products(of.model):
        tuned: Any = apply(of.model, choice).train()
        try:
            with without_cache(tuned):
                for make in replace(of, model=tuned).losses():
                    loss: Callable[[], torch.Tensor] = partial(make, samples)
                    try:
                        step, _ = training_step(tuned, loss, config.optimizer)
                        return time_ms(step, seconds=SECONDS)
                    except UNRECORDABLE as error:
                        last = error
        finally:
            unapply(tuned)
    raise last or RuntimeError("the model has no loss")


def _free_bytes(model: torch.nn.Module) -> float:
    """Free memory of the device that the model is on."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()
