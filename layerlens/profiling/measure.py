"""The profile of a model: its statistics from one pass over the calibration batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from layerlens.exceptions import ProfilingError
from layerlens.integrations.transformers import blocks_of
from layerlens.models import ModelSpec, ModelStatistics
from layerlens.profiling.batches import Batch
from layerlens.profiling.capture import Capture
from layerlens.profiling.footprint import dense_inputs, frozen_footprint
from layerlens.utils.progress import Progress

DAMPING = 1e-2
"""Damping of the K-FAC factors, relative to their mean diagonal."""


def measure(
    model: torch.nn.Module,
    spec: ModelSpec,
    batches: Sequence[Batch],
    *,
    with_factors: bool,
    sequence_length: int,
    threads: int,
    progress: Progress,
) -> ModelStatistics:
    """Measure every layer of ``spec`` on ``batches``.

    Args:
        model: frozen, in evaluation mode; a classifier whose output has ``logits`` [b, classes].
        spec: the layers to measure.
        batches: the calibration data; results do not depend on how it is cut into batches (to rounding).
        with_factors: also find the K-FAC-whitened split-half spectra (slower by about a factor of three).
        sequence_length: tokens of the sequences for which memory and FLOPs are counted.
        threads: for the kernels; torch's own threads are set by the caller.
        progress: told of every batch.

    Raises:
        ProfilingError: a loss or a statistic is not finite, or a layer cannot be measured; names the layer.
    """
    capture = Capture(model, spec, with_factors, threads)
    losses: list[torch.Tensor] = []
    n_tokens = 0
    with progress.stage("Measuring gradients", total=len(batches)) as advance, capture.open():
        for batch in batches:
            capture.start_batch(batch.mask, batch.index % 2)
            logits = model(**batch.inputs).logits
            loss__b = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
            _refuse_bad_loss(loss__b.detach(), batch)
            loss__b.sum().backward()
            losses.append(loss__b.detach())
            n_tokens += int(batch.mask.sum())
            advance(1)
    with progress.stage("Computing statistics", total=None):
        layers = capture.result(DAMPING)
    inputs = dense_inputs(batches[0].inputs, sequence_length)
    activation_bytes, forward_flops = frozen_footprint(model, blocks_of(model)[0], inputs)
    statistics = ModelStatistics(
        layers=layers,
        n_samples=sum(len(batch.labels) for batch in batches),
        n_tokens=n_tokens,
        mean_loss=float(torch.cat(losses).double().mean()),
        activation_bytes=activation_bytes,
        forward_flops=forward_flops,
    )
    refuse_non_finite(statistics)
    return statistics


def refuse_non_finite(statistics: ModelStatistics) -> None:
    """Raise ProfilingError for the first statistic that is NaN or infinite, by layer and name."""
    for layer in statistics.layers:
        for method, measured in layer.by_method.items():
            for name in ("energy", "trace", "signal", "input_mean_square", "spectrum"):
                if not np.all(np.isfinite(getattr(measured, name))):
                    raise ProfilingError(
                        f"{layer.layer}: the {name} statistic for {method} is not finite; the model overflows on this "
                        "data: look for NaN weights or use a smaller data.max_length"
                    )


def _refuse_bad_loss(loss__b: torch.Tensor, batch: Batch) -> None:
    bad = (~torch.isfinite(loss__b)).nonzero().flatten()
    if len(bad):
        raise ProfilingError(
            f"the loss of calibration sample {int(batch.index[bad[0]])} is {float(loss__b[bad[0]])}; the model "
            "overflows on it: look for NaN weights or leave the sample out"
        )
