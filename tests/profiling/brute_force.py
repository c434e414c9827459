"""The other route to every statistic: one backward pass per sample, and what autograd leaves in ``.grad``.

Nothing here knows of taps, ghost norms or tied weights; a parameter's gradient is whatever torch says it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from layerlens.integrations.weight_matrices import measurable_modules
from layerlens.models import MethodStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.tasks.batches import Batch
from layerlens.tasks.losses import Loss
from layerlens.utils.progress import silent

SIGNAL = ("fisher", "gradient", "input_scale")


def singles(batch: Batch) -> list[Batch]:
    """Every sample of a batch alone."""
    return [batch.taken(torch.tensor([n])) for n in range(len(batch.index))]


def pieces(batch: Batch, *sizes: int) -> list[Batch]:
    """A batch cut into batches of these sizes."""
    each, cut = singles(batch), []
    for size in sizes:
        taken, each = each[:size], each[size:]
        inputs = {key: torch.cat([one.inputs[key] for one in taken]) for key in batch.inputs}
        labels, index = (torch.cat([getattr(one, name) for one in taken]) for name in ("labels", "index"))
        cut.append(Batch(inputs, labels, index))
    return cut


def sample_gradients(model: torch.nn.Module, batch: Batch, loss: Loss) -> dict[str, np.ndarray]:
    """Parameter -> gradient of each sample's loss, float64 [n, elements]."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)
    rows: dict[str, list[np.ndarray]] = {}
    for one in singles(batch):
        model.zero_grad()
        loss(model(**one.inputs), one).sum().backward()
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows.setdefault(name, []).append(gradient.double().numpy().ravel().copy())
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    return {name: np.stack(row) for name, row in rows.items()}


def profile(
    model: torch.nn.Module,
    spec: ModelSpec,
    batches: Sequence[Batch],
    loss: Loss,
    *,
    statistics: Sequence[str] = SIGNAL,
    everything: bool = True,
    threads: int = 1,
) -> ModelStatistics:
    """Measure the layers of ``spec`` and, with ``everything``, all other weights."""
    return measure(
        model,
        spec,
        batches,
        request=StatisticsRequest.of(statistics),
        sequence_length=6,
        threads=threads,
        progress=silent,
        loss=loss,
        other_modules=measurable_modules(model, spec) if everything else (),
    )


def weight_statistics(statistics: ModelStatistics) -> dict[str, MethodStatistics]:
    """Statistics by parameter name, of layers and of all other weights."""
    layers = {
        f"{layer.layer}.weight": layer.by_method["lora"] for layer in statistics.layers if "lora" in layer.by_method
    }
    return layers | statistics.other_weights


def assert_equal(statistics: ModelStatistics, gradients: dict[str, np.ndarray], relative: float) -> None:
    """Every measured weight has the energy, trace and signal that its sample gradients have."""
    measured = weight_statistics(statistics)
    assert measured
    for name, found in measured.items():
        each = gradients[name]
        energy, trace = np.square(each.mean(axis=0)).sum(), np.square(each).sum(axis=1).mean()
        signal = energy - (trace - energy) / (len(each) - 1)
        assert found.energy == pytest.approx(energy, rel=relative, abs=relative * trace), name
        assert found.trace == pytest.approx(trace, rel=relative), name
        assert found.signal == pytest.approx(signal, rel=relative, abs=relative * trace), name
