"""The profile of a model: its statistics from one pass over the calibration batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.transformers import blocks_of
from layerlens.integrations.weight_matrices import uncompiled, why_not_measurable
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.profiling.capture import Capture
from layerlens.profiling.footprint import dense_inputs, frozen_footprint
from layerlens.profiling.ntk import kernel_statistics
from layerlens.profiling.request import StatisticsRequest
from layerlens.profiling.saved_pass import SavedPass
from layerlens.tasks import Batch, Loss
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
    with frozen_without_dropout(model, checkpointing=True):
        capture = Capture(model, spec, request, threads, other_modules)
        with progress.stage("Measuring gradients", total=len(batches)) as advance, capture.open():
            n_done, losses = saved.restore(capture) if saved else (0, [])
            advance(n_done)
            for batch in batches[n_done:]:
                losses.append(capture.run(batch, loss))
                if saved:
                    saved.after_batch(capture, losses)
                advance(1)
        with progress.stage("Computing statistics", total=None):
            layers = capture.result(DAMPING)
            others = capture.other_weights(DAMPING)
            kernel = kernel_statistics(capture.gram(), _kept_labels(batches, request)) if request.ntk else None
        covered = capture.covered_weights()
    with frozen_without_dropout(model, checkpointing=False):
        inputs = dense_inputs(batches[0].inputs, sequence_length)
        activation_bytes, forward_flops = frozen_footprint(model, next(iter(blocks_of(model)), None), inputs)
    left_out = _left_out(model, covered)
    total = sum(parameter.numel() for parameter in model.parameters())
    missing = sum(model.get_parameter(name).numel() for name in left_out)
    statistics = ModelStatistics(
        layers=layers,
        n_samples=sum(len(batch.index) for batch in batches),
        n_tokens=sum(batch.n_tokens for batch in batches),
        mean_loss=float(torch.cat(losses).double().mean()),
        activation_bytes=activation_bytes,
        forward_flops=forward_flops,
        kernel=kernel,
        other_weights=others,
        left_out=left_out,
        coverage=1.0 - missing / total,
    )
    refuse_non_finite(statistics)
    return statistics


@contextmanager
def frozen_without_dropout(model: torch.nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """While open, no weight requires a gradient and no module is in training mode; modes and flags come back after.

    A module that checkpoints its activations does so in training mode only (transformers), so with ``checkpointing`` it
    alone has that mode, while what is inside it, dropout included, has not.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False)
        for module, _ in modes:
            module.training = checkpointing and bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
        for module, training in modes:
            module.training = training


def refuse_non_finite(statistics: ModelStatistics) -> None:
    """Raise ProfilingError for the first statistic that is NaN or infinite, by layer and name."""
    measured = [(x.layer, f" for {method}", found) for x in statistics.layers for method, found in x.by_method.items()]
    measured += [(name, "", found) for name, found in statistics.other_weights.items()]
    for name, method, found in measured:
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if value is not None and not np.all(np.isfinite(value)):
                raise ProfilingError(
                    f"{name}: the {field.name} statistic{method} is not finite; the model overflows on this "
                    "data: look for NaN weights or use a smaller data.max_length"
                )


def _kept_labels(batches: Sequence[Batch], request: StatisticsRequest) -> np.ndarray:
    """Targets of the kernel's samples; of another shape where they are no classes or numbers."""
    labels: list[Any] = []
    for batch in batches:
        if not isinstance(batch.labels, torch.Tensor) or batch.labels.dim() != 1:
            return np.zeros((0, 0))
        labels.extend(batch.labels.tolist())
        if len(labels) >= request.ntk_samples:
            break
    return np.array(labels[: request.ntk_samples])


def _left_out(model: torch.nn.Module, covered: dict[str, str]) -> dict[str, str]:
    """Parameters without statistics and why, each tied parameter under the name that the model gives it."""
    have = {id(model.get_parameter(name)) for name in covered}
    left_out = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in have:
            path, _, part = name.rpartition(".")
            module = model.get_submodule(path)
            reason = why_not_measurable(path, module) if part == "weight" else f"not a weight matrix ({part})"
            left_out[name] = reason or "not asked for, or no gradient reaches it"
    return left_out
