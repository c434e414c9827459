"""The profile of a model: its statistics from one pass over the calibration batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.transformers import blocks_of, without_cache
from layerlens.integrations.weight_matrices import uncompiled, why_not_measurable
from layerlens.models import FactorSketch, KernelStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.capture import Capture
from layerlens.profiling.footprint import dense_inputs, frozen_footprint
from layerlens.profiling.module_costs import module_costs
from layerlens.profiling.ntk import kernel_statistics
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.saved_pass import SavedPass
from layerlens.tasks import Batch, Batches, Loss
from layerlens.tasks.losses import classification_loss
from layerlens.utils.progress import Progress

DAMPING = 1e-2
"""Damping of the K-FAC factors, relative to their mean diagonal."""


def measure(
    model: torch.nn.Module,
    spec: ModelSpec,
    batches: Sequence[Batch],
    *,
    request: StatisticsRequest,
    sequence_length: int,
    threads: int,
    progress: Progress,
    loss: Loss = classification_loss,
    other_modules: Sequence[str] = (),
    saved: SavedPass | None = None,
) -> ModelStatistics:
    """Measure every layer of ``spec`` on ``batches``.

    Args:
        model: measured with dropout off; its modes and flags are as before afterwards. A `torch.compile`d model is
            measured through the module it was compiled from, which has the same weights.
        spec: the layers to measure.
        batches: the calibration data; results do not depend on how it is cut into batches (to rounding).
        request: which statistics.
        sequence_length: tokens of the sequences for which memory and FLOPs are counted.
        threads: for the kernels; torch's own threads are set by the caller.
        progress: told of every batch.
        loss: the loss of each sample.
        other_modules: modules outside the layers whose weights are measured too (``measurable_modules``).
        saved: where the pass is kept after batches, and taken up again if an earlier one was interrupted.

    Raises:
        ProfilingError: a loss or a statistic is not finite, or a layer cannot be measured; names the layer.
    """
    model = uncompiled(model)
    n_samples = batches.n_samples if isinstance(batches, Batches) else sum(len(batch.index) for batch in batches)
    request = dataclasses.replace(request, ntk_samples=min(request.ntk_samples, n_samples))
    told = Told()
    with frozen_without_dropout(model, checkpointing=True), without_cache(model):
        capture = Capture(model, spec, request, threads, other_modules)
        with progress.stage("Measuring gradients", total=len(batches)) as advance, capture.open():
            n_done, losses = saved.restore(capture) if saved else (0, [])
            advance(n_done)
            for number in range(len(batches)):  # each is made once, and not kept
                batch = batches[number].halves_apart()
                told.add(batch)
                if number < n_done:
                    continue
                losses.append(capture.run(batch, loss).cpu())
                if saved:
                    saved.after_batch(capture, losses)
                advance(1)
        with progress.stage("Computing statistics", total=None):
            layers = capture.result(DAMPING)
            others = capture.other_weights(DAMPING)
            kernel = kernel_of(capture.gram(), request.ntk_samples, told) if request.ntk else None
        covered = capture.covered_weights()
    with frozen_without_dropout(model, checkpointing=False), without_cache(model):
        inputs = dense_inputs(batches[0].inputs, sequence_length)
        first_block = next(iter(blocks_of(model)), None)
        activation_bytes, forward_flops = frozen_footprint(model, first_block, inputs)
        modules = module_costs(model, first_block, inputs, request)
    left_out, coverage = left_out_of(model, covered)
    statistics = ModelStatistics(
        layers=layers,
        n_samples=n_samples,
        n_tokens=told.n_tokens,
        mean_loss=float(torch.cat(losses).double().mean()),
        activation_bytes=activation_bytes,
        forward_flops=forward_flops,
        kernel=kernel,
        other_weights=others,
        left_out=left_out,
        coverage=coverage,
        modules=modules,
    )
    refuse_non_finite(statistics)
    return statistics


@contextmanager
def frozen_without_dropout(model: torch.nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """While open, no weight requires a gradient and no module is in training mode; modes and flags come back after.

    A module that checkpoints its activations does so in training mode only (transformers), so with ``checkpointing`` it
    alone has that mode, while what is inside it, dropout included, has not. Without it nothing checkpoints.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    checkpoints: list[Any] = [x for x, _ in modes if getattr(x, "gradient_checkpointing", False) is True]
    try:
        for module in checkpoints:
            module.gradient_checkpointing = checkpointing
        model.requires_grad_(False)
        for module, _ in modes:
            module.training = checkpointing and bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
        for module, training in modes:
            module.training = training
        for module in checkpoints:
            module.gradient_checkpointing = True


def refuse_non_finite(statistics: ModelStatistics) -> None:
    """Raise ProfilingError for the first statistic that is NaN or infinite, by layer and name."""
    measured = [(x.layer, f" for {method}", found) for x in statistics.layers for method, found in x.by_method.items()]
    measured += [(name, "", found) for name, found in statistics.other_weights.items()]
    for name, method, found in measured:
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if isinstance(value, FactorSketch):
                value = value.values
            if value is not None and not np.all(np.isfinite(value)):
                raise ProfilingError(
                    f"{name}: the {field.name} statistic{method} is not finite; the model overflows on this "
                    "data: look for NaN weights or use a smaller data.max_length"
                )


@dataclasses.dataclass
class Told:
    """What is kept of the samples in the order in which they are measured: not their inputs."""

    n_tokens: int = 0
    index: list[torch.Tensor] = dataclasses.field(default_factory=list)
    labels: list[torch.Tensor | None] = dataclasses.field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Keep one batch's; its targets only where there is one number for each sample."""
        one_each = isinstance(batch.labels, torch.Tensor) and batch.labels.dim() == 1
        self.n_tokens += batch.n_tokens
        self.index.append(batch.index)
        self.labels.append(batch.labels.cpu() if one_each else None)


def kernel_of(grams: np.ndarray, count: int, told: Told) -> KernelStatistics:
    """The kernel of the first ``count`` samples that were measured, in the order that they have in the calibration set.

    Args:
        grams: float64 [sketches, count, count], in the order of measuring.
        count: how many samples.
        told: what is kept of the samples.
    """
    order = torch.cat(told.index)[:count].argsort().numpy()
    labels = [part for part in told.labels if part is not None]
    comparable = len(labels) == len(told.labels)
    of_samples = torch.cat(labels)[:count].numpy()[order] if comparable else np.zeros((0, 0))
    return kernel_statistics(grams[:, order][:, :, order], of_samples)


def left_out_of(model: torch.nn.Module, covered: dict[str, str]) -> tuple[dict[str, str], float]:
    """(parameters without statistics and why, share of the parameters that have some).

    Each tied parameter is under the name that the model gives it.
    """
    have = {id(model.get_parameter(name)) for name in covered}
    left_out = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in have:
            path, _, part = name.rpartition(".")
            module = model.get_submodule(path)
            reason = why_not_measurable(path, module) if part == "weight" else f"not a weight matrix ({part})"
            left_out[name] = reason or "not asked for, or no gradient reaches it"
    total = sum(parameter.numel() for parameter in model.parameters())
    missing = sum(model.get_parameter(name).numel() for name in left_out)
    return left_out, 1.0 - missing / total
