"""What callers of the library can get wrong, each with the layer and the field in the message."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from layerlens.config import OptimizationConfig, ProfilingConfig
from layerlens.exceptions import ActivationCacheError, ConfigurationError, ModelSpecError
from layerlens.models import LayerSpec, ModelSpec
from layerlens.utils.validation import validate_activation_cache, validate_config, validate_model_spec

NAMES = [f"encoder.layer.{index}" for index in range(12)]
SPEC = ModelSpec("bert", 110_000_000, [LayerSpec(name, 768) for name in NAMES])


def cache(**of_the_third: Any) -> dict[str, dict[str, Any]]:
    values = {name: {"grad_norm": 0.5, "fisher_trace": 0.3} for name in NAMES}
    values[NAMES[2]] |= of_the_third
    return values


def test_what_is_valid_passes_and_is_left_as_it_was() -> None:
    plain, of_numpy = cache(), cache(grad_norm=np.float32(0.0), fisher_trace=np.int64(3))
    gains = {name: {"proxy_gain": -0.1} for name in NAMES}
    optimization = OptimizationConfig(max_flops=1e9, objective_weights={"utility": 1, "flops": 0.1})
    validate_model_spec(SPEC)
    for given in (plain, of_numpy, gains):
        validate_activation_cache(given, SPEC)
    validate_config(ProfilingConfig(), optimization)
    assert plain == cache()
    assert of_numpy == cache(grad_norm=np.float32(0.0), fisher_trace=np.int64(3))
    assert gains == {name: {"proxy_gain": -0.1} for name in NAMES}
    assert optimization.objective_weights == {"utility": 1, "flops": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "model 'bert' has no layers"),
        ({"model_name": " "}, "model_name must be text"),
        ({"total_params": 0}, "total_params must be a whole number above 0, got 0"),
        ({"total_params": float("nan")}, "total_params must be a whole number above 0, got nan"),
        ({"weight_bytes": -1}, "weight_bytes must be a whole number above 0, got -1"),
        ({"layers": [{"name": "a"}]}, r"layers\[0\] must be a LayerSpec, got dict"),
        ({"layers": [LayerSpec("", 8)]}, r"layers\[0\].name must be text, got ''"),
        ({"layers": [LayerSpec("a", 8), LayerSpec("a", 8)]}, r"'a' appears twice \(layers\[0\] and layers\[1\]\)"),
        ({"layers": [LayerSpec("a", 0)]}, "layer 'a': hidden_size must be a whole number above 0, got 0"),
        ({"layers": [LayerSpec("a", True)]}, "layer 'a': hidden_size must be a whole number above 0, got True"),
        ({"layers": [LayerSpec("a", 8, n_in=-8)]}, "layer 'a': n_in must be a whole number above 0, got -8"),
        ({"layers": [LayerSpec("a", 8, n_out=1.5)]}, "layer 'a': n_out must be a whole number above 0, got 1.5"),
        ({"layers": [LayerSpec("a", 8, num_heads=0)]}, "layer 'a': num_heads must be a whole number above 0, got 0"),
        (
            {"layers": [LayerSpec("a", 8, "pooling")]},
            "layer 'a': layer_type must be one of transformer, linear, attention, conv",
        ),
        ({"layers": [LayerSpec("a", 8, methods=())]}, "layer 'a': methods is empty"),
        ({"layers": [LayerSpec("a", 8, methods=("none",))]}, "unknown method 'none'; known: lora, adapter, prefix"),
        ({"layers": [LayerSpec("a", 8, block=-1)]}, "layer 'a': block must be None or an index from 0, got -1"),
    ],
)
def test_model_spec(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelSpecError, match=message):
        validate_model_spec(dataclasses.replace(SPEC, **changes))


def test_something_else_than_a_model_spec() -> None:
    with pytest.raises(ModelSpecError, match="expected a ModelSpec, got dict"):
        validate_model_spec({})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"lacks 12 of 12 layers: encoder.layer.0, .*, encoder.layer.4 and 7 more; measure every layer"),
        ({NAMES[0]: {"grad_norm": 1.0}}, "lacks 11 of 12 layers: encoder.layer.1, "),
        (cache() | {"encoder.layers.3": {}}, "unknown layer 'encoder.layers.3' .*; nearest known: encoder.layer.3, "),
        (cache() | {"zzz": {}}, "unknown layer 'zzz' .*; the model has encoder.layer.0, "),
        (cache(grad_norm=float("nan")), "layer 'encoder.layer.2': grad_norm is nan, not a finite number"),
        (cache(fisher_trace=np.float32("inf")), "layer 'encoder.layer.2': fisher_trace is inf, not a finite number"),
        (cache(fisher_trace=-1.0), "layer 'encoder.layer.2': fisher_trace cannot be negative, got -1.0"),
        (cache(grad_norm=-1.0), "layer 'encoder.layer.2': grad_norm cannot be negative, got -1.0"),
        (cache(grad_norm="1"), "layer 'encoder.layer.2': grad_norm must be a number, got '1'"),
        (cache(grad_norm=None), "layer 'encoder.layer.2': grad_norm must be a number, got None"),
        (cache(grad_norm=True), "layer 'encoder.layer.2': grad_norm must be a number, got True"),
        (cache(grad_nrom=1.0), "layer 'encoder.layer.2': unknown metric 'grad_nrom', did you mean 'grad_norm'?"),
        (cache(zzz=1.0), "unknown metric 'zzz'; known: grad_norm, fisher_trace, proxy_gain"),
        (cache(proxy_gain=1.0), "'proxy_gain' is missing in 11 of 12 layers: encoder.layer.0, "),
        (cache() | {NAMES[2]: {}}, "layer 'encoder.layer.2': has no metrics"),
        (cache() | {NAMES[2]: 0.5}, "layer 'encoder.layer.2': expected a mapping of metrics, got float"),
        ([], "expected a mapping of layer -> metrics, got list"),
    ],
)
def test_activation_cache(values: Any, message: str) -> None:
    with pytest.raises(ActivationCacheError, match=message):
        validate_activation_cache(values, SPEC)


def test_configurations() -> None:
    budget = OptimizationConfig(max_flops=1e9)
    with pytest.raises(ConfigurationError, match="expected ProfilingConfig, got dict"):
        validate_config({}, budget)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="expected OptimizationConfig, got NoneType"):
        validate_config(ProfilingConfig(), None)  # type: ignore[arg-type]
    unchecked = budget.model_copy(update={"max_vram_gb": -1.0})
    with pytest.raises(ConfigurationError, match=r"OptimizationConfig\.max_vram_gb: .* greater than 0, got -1"):
        validate_config(ProfilingConfig(), unchecked)


def test_configurations_that_are_built_in_code_say_what_is_wrong() -> None:
    for values, message in (
        ({"max_flops": 0}, "OptimizationConfig.max_flops: must be greater than 0, got 0"),
        ({"max_flops": 1, "max_flop": 1}, "OptimizationConfig.max_flop: there is no such field, got 1"),
        ({}, "OptimizationConfig: no budget given; set at least one of max_trainable_params, "),
    ):
        with pytest.raises(ConfigurationError) as caught:
            OptimizationConfig(**values)
        assert str(caught.value).startswith(message)
