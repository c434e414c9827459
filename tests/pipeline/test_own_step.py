"""A run whose choice depends on step times measures one step of its model, and scales the device's rates by it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from layerlens.config import RunConfig
from layerlens.cost.device import load_profile
from layerlens.cost.rates import DeviceProfile
from layerlens.jobs import own_step
from layerlens.pipeline import run_config
from layerlens.profiling.statistics_file import load_statistics


@pytest.fixture
def timed(settings: dict[str, Any]) -> RunConfig:
    """The settings, with a budget of time that every choice keeps."""
    return RunConfig.model_validate({**settings, "optimization": {**settings["optimization"], "max_step_ms": 1e6}})


def rates_of(result: Any) -> dict[str, Any]:
    _, statistics = load_statistics(result.files["statistics"])
    assert statistics.step is not None
    assert statistics.step.rates is not None
    return statistics.step.rates


def state_of(model: torch.nn.Module) -> list[Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [
        {name: (tensor.requires_grad, tensor.grad is None, tensor.tolist()) for name, tensor in tensors.items()},
        {name: (type(module), module.training) for name, module in model.named_modules()},
        torch.get_rng_state().tolist(),
    ]


def test_rates_are_scaled_by_the_measured_step_and_kept(timed, tmp_path, monkeypatch):
    measured, states = own_step._measured, []

    def watched(of: Any, *rest: Any) -> float:
        states.append(state_of(of.model))
        found = measured(of, *rest)
        states.append(state_of(of.model))
        return found

    monkeypatch.setattr(own_step, "_measured", watched)
    result = run_config(timed, base_dir=tmp_path)
    before, after = states
    assert before == after  # the model and the generator of random numbers
    (kept,) = (tmp_path / "cache").glob("step-*.json")
    fields = json.loads(kept.read_text(encoding="utf-8"))
    scale = fields["measured_ms"] / fields["predicted_ms"]
    (device,) = (tmp_path / "cache").glob("device-*.json")
    profile = load_profile(device)
    assert profile is not None
    assert DeviceProfile.of(rates_of(result)) == DeviceProfile.of(asdict(profile.scaled(scale)))
    assert scale != 1.0
    assert any(f"{scale:.2f} times as long" in told for told in result.warnings) == (not 0.8 <= scale <= 1.25)

    monkeypatch.setattr(own_step, "_measured", lambda *_: pytest.fail("what is kept was measured again"))
    again = run_config(timed, base_dir=tmp_path)
    assert rates_of(again) == rates_of(result)

    monkeypatch.setattr(own_step, "_measured", measured)
    kept.write_text('{"measured_ms": NaN, "predicted_ms": 1}', encoding="utf-8")  # damaged: measured again
    run_config(timed, base_dir=tmp_path)
    assert json.loads(kept.read_text(encoding="utf-8"))["measured_ms"] > 0.0
    for damage in ("{", "[]", '{"measured_ms": 1, "predicted_ms": 0}', '{"measured_ms": 1, "predicted_ms": Infinity}'):
        kept.write_text(damage, encoding="utf-8")
        assert own_step._kept(kept) is None


def test_a_step_that_memory_is_short_for_is_not_run_and_that_is_said(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(own_step, "_free_bytes", lambda model: 1e3)
    result = run_config(timed, base_dir=tmp_path)
    assert any("no training step of this model was timed (it may need" in told for told in result.warnings)
    assert not list((tmp_path / "cache").glob("step-*.json"))


def test_without_a_budget_of_time_nothing_is_timed(settings, tmp_path):
    run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    assert not list((tmp_path / "cache").glob("step-*.json"))
