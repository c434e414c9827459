"""Losses of samples that depend on the others in their batch are found, and measured by batches or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layerlens.exceptions import ConfigurationError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.library import api
from layerlens.profiling.coupling import Units, coupling, of_batches
from layerlens.profiling.measure import measure
from layerlens.profiling.request import StatisticsRequest
from layerlens.tasks import Batch
from layerlens.tasks.losses import BatchLoss
from layerlens.utils.progress import silent


class Net(nn.Module):
    """Two layers, with something between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.between, self.out = nn.Linear(6, 8), between, nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.between(self.inner(x)))


def batches(n: int = 3, size: int = 6) -> list[Batch]:
    drawn = torch.Generator().manual_seed(1)
    found = []
    for number in range(n):
        x, y = torch.randn(size, 6, generator=drawn), torch.randint(0, 4, (size,), generator=drawn)
        found.append(Batch({"x": x}, y, torch.arange(number * size, (number + 1) * size)))
    return found


def own(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(output, batch.labels, reduction="none")


def in_batch_negatives(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    unit = nn.functional.normalize(output, dim=-1)
    return nn.functional.cross_entropy(unit @ unit.T / 0.1, torch.arange(len(unit)), reduction="none")


def neighbours(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Samples 0 and 1, 2 and 3 ... are pairs."""
    pairs = output[: len(output) // 2 * 2].unflatten(0, (-1, 2))
    apart = (pairs[:, 0] - pairs[:, 1]).square().sum(-1).repeat_interleave(2)
    return nn.functional.pad(apart, (0, len(output) - len(apart)))


def divided(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return own(output, batch) / len(output)


def weighted(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Class weights are each sample's own matter."""
    return nn.functional.cross_entropy(output, batch.labels, weight=torch.arange(1.0, 5.0), reduction="none")


def batch_norm(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize("loss", [in_batch_negatives, neighbours, divided])
def test_losses_that_depend_on_others_are_found(loss: Any):
    assert "of a batch of 6 samples" in coupling(Net(), batches(), loss).said


def test_models_that_depend_on_others_are_found():
    assert coupling(Net(batch_norm), batches(), own).said
    assert coupling(Net(nn.BatchNorm1d(8, track_running_stats=False)).eval(), batches(), own).said
    assert coupling(Net(lambda x: x - x.mean(0)), batches(), own).said
    assert not coupling(Net(nn.BatchNorm1d(8)).eval(), batches(), own).said
    assert not coupling(Net(nn.LayerNorm(8)), batches(), own).said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("loss", [own, weighted])
def test_losses_that_do_not_are_not(dtype: torch.dtype, loss: Any):
    found = [Batch({"x": one.inputs["x"].to(dtype)}, one.labels, one.index) for one in batches()]
    said = coupling(Net().to(dtype), found, lambda output, batch: loss(output.float(), batch))
    assert not said.said
    assert not said.random
    assert not coupling(Net(), batches(size=1), in_batch_negatives).said  # no batch has two


def test_losses_that_draw_are_told_from_those_that_depend_on_others():
    found = coupling(Net(lambda x: x + torch.randn_like(x)), batches(), own)
    assert found.random
    assert not found.said


def test_by_batches_is_the_mean_of_every_batch():
    model = Net(batch_norm).requires_grad_(False)
    spec = model_spec(PretrainedModel(model, None, "net", ()), "net", inputs=batches()[0].inputs)
    settings: dict[str, Any] = {"sequence_length": 1, "threads": 1, "progress": silent}
    request = StatisticsRequest.of({"gradient", "input_scale"})
    by_hand = BatchLoss(lambda model, batch: nn.functional.cross_entropy(model(**batch.inputs), batch.labels))
    one = measure(model, spec, Units(batches(4)), request=request, loss=of_batches(own, "own"), **settings)
    other = measure(model, spec, list(Units(batches(4))), request=request, loss=by_hand, **settings)
    assert one.n_samples == 4
    assert one.mean_loss == pytest.approx(other.mean_loss, rel=1e-6)  # float32 means of six
    for a, b in zip(one.layers, other.layers, strict=True):
        assert a.by_method["lora"].energy == pytest.approx(b.by_method["lora"].energy, rel=1e-4)


def test_a_plan_is_made_by_batches_or_refused():
    data = [(one.inputs, one.labels) for one in batches(8)]

    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return in_batch_negatives(output, Batch({}, y, y))

    plan = api.plan(Net(), data, loss=loss, max_trainable_params=100, threads=1)
    assert any("depends on the other samples in a batch" in line for line in plan.notes)
    with pytest.raises(ConfigurationError, match=r"fisher need the loss of each sample, and model\.loss depends"):
        api.plan(Net(), data, loss=loss, max_trainable_params=100, threads=1, statistics=["fisher"])
