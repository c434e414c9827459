"""A PEFT method and a utility model that a program registers: measured, chosen, put in, trained, kept, loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from layerlens.config import RunConfig
from layerlens.config.study import study_arms
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.transformers import dense_shape
from layerlens.manifest import read_manifest
from layerlens.methods import OUTPUT, AddedModule, Operation
from layerlens.models import LayerSpec
from layerlens.pipeline import run_config
from layerlens.registry import METHODS, UTILITY_MODELS
from layerlens.tuning import apply, load, merge, save, unapply
from layerlens.tuning.base_model import load_base
from layerlens.utility import UtilityModel


class Scale(torch.nn.Module):
    """s ⊙ y with s = 1 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(width))
        self.rank = 1

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return (y * self.scale).to(y.dtype)


class ScaleMethod(AddedModule):
    """A trained factor for each output feature (IA³, Liu et al. 2022)."""

    name, label, plural, unit, letter = "scale", "scale", "scales", "factors", "S"
    reads = OUTPUT
    mergeable = True

    def trainable_params(self, layer: LayerSpec, size: int) -> int:
        return layer.n_out

    def marginal_params(self, layer: LayerSpec) -> int:
        return layer.n_out

    def operations(self, layer: LayerSpec, size: int) -> list[Operation]:
        return [Operation(0, 2 * layer.n_out, layer.n_out)]

    def kept_elements(self, layer: LayerSpec, size: int) -> float:
        return layer.n_out

    def matrix_shape(self, layer: LayerSpec) -> tuple[int, int, int]:
        return layer.n_out, 1, 1

    def gradient_operands(self, d__bgto: Any, z__bgti: Any) -> tuple[Any, Any]:
        return d__bgto.transpose(1, 3), z__bgti.transpose(1, 3)

    def build(self, model: Any, target: Any, layer: str, size: int, seed: int) -> tuple[torch.nn.Module, str]:
        width = dense_shape(target)[1]
        return Scale(width), f"output width {width}"

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        for layer, module in self.modules_in(model).items():
            target: Any = model.get_submodule(layer)
            with torch.no_grad():
                target.weight.mul_(module.scale[:, None])
                target.bias.mul_(module.scale)
        self.remove(model)
        return model


def per_feature(spec: Any, statistics: Any, options: Any) -> np.ndarray:
    """√energy of the method's matrix."""
    by_layer = statistics.by_name()
    energies = [by_layer[one.layer].by_method[one.method].energy if one.rank else 0.0 for one in options]
    return np.sqrt(np.array(energies))


@pytest.fixture
def registered() -> Iterator[None]:
    METHODS.register("scale", ScaleMethod())
    UTILITY_MODELS.register("per_feature", UtilityModel("per_feature", per_feature, "root energy", ("gradient",)))
    yield
    METHODS.unregister("scale")
    UTILITY_MODELS.unregister("per_feature")


@pytest.fixture
def scaled(settings: dict[str, Any], registered: None) -> dict[str, Any]:
    settings["profiling"] = {**settings.get("profiling", {}), "utility_model": "per_feature"}
    profile = {"batch_size": 2, "sequence_length": 16}
    settings["optimization"] = {"methods": ["scale"], "max_trainable_params": 400, "latency_profile": profile}
    return settings


def test_it_is_chosen_put_in_trained_kept_and_merged(scaled, tmp_path):
    result = run_config(RunConfig.model_validate(scaled), base_dir=tmp_path)
    manifest = read_manifest(tmp_path / "out/manifest.json")
    chosen = [row for row in manifest.allocations if row.method != "none"]
    assert chosen
    assert {row.method for row in chosen} == {"scale"}
    assert manifest.utility_model == "per_feature"
    assert all(row.utility > 0 for row in chosen)
    checked = result.measured["trainable_params"]
    assert checked["predicted"] == checked["measured"] == sum(row.cost for row in chosen)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert "scale 1" in (tmp_path / "out/report.html").read_text()

    base = load_base(manifest).model.eval()
    inputs = {"input_ids": torch.arange(5, 21).reshape(2, 8)}
    frozen = base(**inputs).logits
    tuned = apply(base, manifest)
    assert torch.equal(tuned.eval()(**inputs).logits, frozen)
    own = [parameter for name, parameter in tuned.named_parameters() if METHODS["scale"].parameter_mark in name]
    assert sum(parameter.numel() for parameter in own) == sum(row.cost for row in chosen)
    optimizer = torch.optim.SGD([x for x in tuned.parameters() if x.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert any(bool((parameter != 1).any()) for parameter in own)
    trained = tuned.eval()(**inputs).logits
    save(tuned, tmp_path / "kept")
    again = load(load_base(manifest).model, tmp_path / "kept").eval()
    assert torch.equal(again(**inputs).logits, trained)
    # products in another order: s (W h + b) and (s W) h + s b in float32, values of order 1
    torch.testing.assert_close(merge(again)(**inputs).logits, trained, atol=1e-5, rtol=1e-5)
    unapplied = unapply(tuned).eval()
    assert not any(METHODS["scale"].parameter_mark in name for name in unapplied.state_dict())
    assert torch.equal(unapplied(**inputs).logits, frozen)


def test_what_is_not_registered_is_no_name(settings):
    settings["optimization"]["methods"] = ["scale"]
    with pytest.raises(ConfigurationError, match="scale"):
        RunConfig(**settings)


def test_its_sizes_have_a_key_and_a_study_an_arm(scaled):
    scaled["optimization"]["method_sizes"] = {"scale": [1, 1]}
    assert RunConfig(**scaled).optimization.ranks() == {"scale": (1,)}
    assert "per_feature" in study_arms()
    scaled["optimization"]["method_sizes"] = {"lora": [1]}
    with pytest.raises(ConfigurationError, match="lora_ranks"):
        RunConfig(**scaled)
