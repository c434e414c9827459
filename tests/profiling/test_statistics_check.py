"""Statistics from a file that no measurement can have given are refused by layer and field."""

from __future__ import annotations

import dataclasses

import pytest

from layerlens.exceptions import ActivationCacheError
from layerlens.models import LayerSpec, LayerStatistics, MethodStatistics, ModelSpec, ModelStatistics
from layerlens.profiling.statistics_file import check_statistics, load_statistics, statistics_to_bytes

GOOD = MethodStatistics(energy=1.0, trace=2.0, signal=-0.5, input_mean_square=1.0)
LAYERS = [LayerSpec(name, 4, "linear", methods=("lora",)) for name in ("a", "b")]


def statistics(**changes: object) -> ModelStatistics:
    layers = tuple(LayerStatistics(layer.name, {"lora": GOOD}) for layer in LAYERS)
    return dataclasses.replace(ModelStatistics(layers, 8, 80, 1.0, 1.0, 1.0), **changes)


def one_layer(name: str = "b", method: str = "lora", **values: object) -> dict[str, object]:
    changed = dataclasses.replace(GOOD, **values)
    return {"layers": (statistics().layers[0], LayerStatistics(name, {method: changed}))}


def test_what_was_measured_passes():
    check_statistics(ModelSpec("m", 10, LAYERS), statistics())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (one_layer(energy=-1.0), "b: lora: energy cannot be negative, got -1.0"),
        (one_layer(trace="abc"), "b: lora: trace must be a number, got 'abc'"),
        (one_layer(signal=True), "b: lora: signal must be a number, got True"),
        (one_layer(method="adapter"), "b: has statistics for adapter, but takes lora"),
        (one_layer(name="c"), "'c' stands where 'b' should"),
        (one_layer(name="a"), "'a' stands where 'b' should"),
        ({"layers": statistics().layers[:1]}, "1 of 2 are there"),
        ({"n_samples": 0}, "n_samples must be 2 or more, got 0"),
    ],
)
def test_impossible_statistics_are_refused(changes, message, tmp_path):
    spec = ModelSpec("m", 10, LAYERS)
    with pytest.raises(ActivationCacheError, match=message):
        check_statistics(spec, statistics(**changes))
    path = tmp_path / "edited.safetensors"
    path.write_bytes(statistics_to_bytes(spec, statistics(**changes)))
    with pytest.raises(ActivationCacheError, match=rf"edited\.safetensors: .*{message}"):
        load_statistics(path)


def test_impossible_shapes_are_refused():
    broken = dataclasses.replace(LAYERS[0])
    object.__setattr__(broken, "n_in", 0)
    with pytest.raises(ActivationCacheError, match="a: n_in must be a whole number above 0, got 0"):
        check_statistics(ModelSpec("m", 10, [broken, LAYERS[1]]), statistics())
