"""What is measured of a trainer is the gradient of its own loss: against autograd, layer by layer."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from picture import differences, picture, random_state
from test_trainers import TRAINERS
from trainer_support import sft

import layerlens
from layerlens.exceptions import ConfigurationError, ProfilingError
from layerlens.library.single_losses import single_losses
from layerlens.library.trainers import opened

SETTINGS = {"calibration_samples": 8, "threads": 1}
LOOSE = {"sft, bfloat16": 0.1}  # products of 8 bits, squared and added up; else float32
RTOL = 1e-4


@pytest.fixture(params=TRAINERS)
def name(request):
    return request.param


def squared_norms(given, losses, layers) -> dict[str, float]:
    layers = [layer for layer in layers if "lora" in layer.methods]
    weights = [given.model.get_submodule(layer.name).weight for layer in layers]
    found = torch.autograd.grad(sum(losses) / len(losses), weights)
    return {layer.name: float(part.double().square().sum()) for layer, part in zip(layers, found, strict=True)}


def test_energy_is_that_of_the_mean_gradient(name, tmp_path):
    trainer = TRAINERS[name](tmp_path)
    found = layerlens.profile(trainer, statistics=["gradient"], **SETTINGS)
    with opened(trainer, found.statistics.n_samples) as given:
        losses = [given.loss(given.model, batch) for batch in given.batches]
        expected = squared_norms(given, losses, found.spec.layers)
    layers = [one for one in found.statistics.layers if "lora" in one.by_method]
    measured = {one.layer: one.by_method["lora"].energy for one in layers}
    assert len(measured) > 10
    assert measured == pytest.approx(expected, rel=LOOSE.get(name, RTOL), abs=1e-12)


@pytest.mark.parametrize("name", ["classifier", "causal, accumulated", "sft, completion only", "dpo", "reward"])
def test_fisher_is_of_single_samples(name, tmp_path):
    trainer = TRAINERS[name](tmp_path)
    found = layerlens.profile(trainer, statistics=["fisher"], **SETTINGS)
    assert found.statistics.n_samples == 8
    with opened(trainer, 8) as given:
        singles = single_losses(given, 8)
        each = [squared_norms(given, [singles.loss(given.model, one)], found.spec.layers) for one in singles.batches]
    expected = {name: sum(one[name] for one in each) / 8 for name in each[0]}
    layers = [one for one in found.statistics.layers if "lora" in one.by_method]
    measured = {one.layer: one.by_method["lora"].trace for one in layers}
    assert measured == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("name", ["sft, packed", "sentences"])
def test_statistics_by_sample_are_refused_by_name(name, tmp_path):
    trainer = TRAINERS[name](tmp_path)
    with pytest.raises(ProfilingError, match=r"no loss of each sample: (packing|the mean gradient of [24])") as error:
        layerlens.profile(trainer, statistics=["fisher"], **SETTINGS)
    assert type(trainer).__name__ in str(error.value)


@pytest.mark.parametrize("end", [None, KeyboardInterrupt])
def test_planning_leaves_a_trainer_as_it_was(name, tmp_path, end, monkeypatch):
    trainer = TRAINERS[name](tmp_path)
    for module in trainer.model.modules():
        module.training = True
    before, random_before = picture(vars(trainer)), random_state()
    if end is None:
        plan = layerlens.plan(trainer, max_trainable_params="1k", **SETTINGS)
        assert plan.ranks
    else:  # in the middle of the third batch
        calls = []
        real = torch.autograd.backward

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise end
            return real(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, "backward", interrupted)
        with pytest.raises(end):
            layerlens.plan(trainer, max_trainable_params="1k", **SETTINGS)
        monkeypatch.undo()
    assert random_state() == random_before
    assert differences(before, picture(vars(trainer))) == []


def test_a_trainer_brings_its_own_data(tmp_path):
    trainer = sft(tmp_path)
    with pytest.raises(ConfigurationError, match=r"data: a SFTTrainer has its own.*trainer\.model"):
        layerlens.plan(trainer, ["some text"], max_trainable_params="1k")
    with pytest.raises(ConfigurationError, match="budget"):
        layerlens.plan(trainer)
