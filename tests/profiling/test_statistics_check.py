"""Statistics from a file that no measurement can have given are refused by layer and field."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from typing import Any

import numpy as np
import pytest

from layerlens.exceptions import ActivationCacheError, ProfilingError
from layerlens.models import (
    FactorSketch,
    KernelStatistics,
    LayerSpec,
    LayerStatistics,
    MethodStatistics,
    ModelSpec,
    ModelStatistics,
)
from layerlens.profiling.statistics import Statistic
from layerlens.profiling.statistics_file import check_statistics, load_statistics, statistics_to_bytes
from layerlens.registry import STATISTICS

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
        (one_layer(trace="abc"), "b: lora: trace must be a finite number, got 'abc'"),
        (one_layer(signal=float("nan")), "b: lora: signal must be a finite number, got nan"),
        (one_layer(energy=10**400), "b: lora: energy must be a finite number, got 1000"),
        ({"mean_loss": float("inf")}, "mean_loss must be a finite number, got inf"),
        (one_layer(signal=True), "b: lora: signal must be a finite number, got True"),
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


ARRAYS = {
    "spectrum": np.array([2.0, 1.0]),
    "plain_spectrum": np.array([2.0, 1.0]),
    "sketched_spectrum": np.array([2.0, 1.0]),
    "input_factor": np.ones((1, 4, 4), np.float32),
    "output_factor": np.ones((1, 4, 4), np.float32),
    "input_sketch": FactorSketch(np.array([2.0]), np.ones((4, 1), np.float32), 3.0, 0.5),
    "output_sketch": FactorSketch(np.array([2.0]), np.ones((4, 1), np.float32), 3.0, 0.5),
    "extra": {"theirs.array": np.ones((2, 3)), "theirs.number": 1.0},
}
WHOLE = {
    **one_layer(**ARRAYS),
    "other_weights": {"embeddings": MethodStatistics(spectrum=np.array([1.0]))},
    "kernel": KernelStatistics(np.eye(3), 3.0, 3.0, None),
    "extra": {"theirs.of_model": np.ones(2)},
}
TENSORS = {
    **{f"b|lora|{name}": ("F64", [2]) for name in ("spectrum", "plain_spectrum", "sketched_spectrum")},
    **{f"b|lora|{name}": ("F32", [1, 4, 4]) for name in ("input_factor", "output_factor")},
    **{f"b|lora|{name}|values": ("F64", [1]) for name in ("input_sketch", "output_sketch")},
    **{f"b|lora|{name}|vectors": ("F32", [4, 1]) for name in ("input_sketch", "output_sketch")},
    "b|lora|theirs.array": ("F64", [2, 3]),
    "embeddings|weight|spectrum": ("F64", [1]),
    "kernel|gram": ("F64", [3, 3]),
    "model|theirs.of_model": ("F64", [2]),
}
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F4": 4,
    "C64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip


def taken_apart(content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    (length,) = struct.unpack_from("<Q", content)
    head, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    return head, {name: data[slice(*one["data_offsets"])] for name, one in head.items() if name != "__metadata__"}


def put_together(head: dict[str, Any], data: dict[str, bytes]) -> bytes:
    place, written = 0, {"__metadata__": head["__metadata__"]}
    for name, part in data.items():
        written[name] = {**head[name], "data_offsets": [place, place + len(part)]}
        place += len(part)
    text = json.dumps(written).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data.values())


def whole_file() -> bytes:
    return statistics_to_bytes(ModelSpec("m", 10, LAYERS), statistics(**WHOLE))


def test_a_file_with_every_kind_of_tensor_is_read_as_it_was_written(tmp_path):
    head, data = taken_apart(whole_file())
    shared = json.loads(head["__metadata__"]["layerlens"])["shared"]
    assert {name: (head[name]["dtype"], head[name]["shape"]) for name in data} | {
        name: TENSORS[first] for name, first in shared.items()
    } == TENSORS
    path = tmp_path / "s.safetensors"
    path.write_bytes(whole_file())
    assert statistics_to_bytes(*load_statistics(path)) == whole_file()


@pytest.mark.parametrize("name", TENSORS)
def test_every_other_dtype_is_refused_by_name(name, tmp_path):
    """Of the same count of values, which is the hardest to see; NumPy cannot read six of these at all."""
    head, data = taken_apart(whole_file())
    declared, shape = TENSORS[name]
    path = tmp_path / "s.safetensors"
    for dtype, bits in BITS.items():
        if dtype == declared:
            continue
        wanted = [*shape, 8]  # a whole number of bytes
        head[name] = {"dtype": dtype, "shape": wanted}
        path.write_bytes(put_together(head, data | {name: bytes(math.prod(wanted) * bits // 8)}))
        with pytest.raises(ActivationCacheError) as caught:
            load_statistics(path)
        assert f"tensor {name!r} has dtype {dtype} and must have {declared}" in str(caught.value)


@pytest.mark.parametrize("name", TENSORS)
def test_other_shapes_missing_and_unknown_tensors_and_nan_are_refused_by_name(name, tmp_path):
    path = tmp_path / "s.safetensors"
    dtype, shape = TENSORS[name]

    def refused(head, data):
        path.write_bytes(put_together(head, data))
        with pytest.raises(ActivationCacheError) as caught:
            load_statistics(path)
        return str(caught.value)

    bytes_each = BITS[dtype] // 8
    if "theirs" not in name:
        for other in ([], [*shape, 1], *([[*shape[:-1], shape[-1] + 1]] if len(shape) > 1 else [])):
            head, data = taken_apart(whole_file())
            head[name]["shape"] = other
            said = refused(head, data | {name: bytes(math.prod(other) * bytes_each)})
            assert f"has shape {other} and must have [" in said
    for bad in (np.nan, np.inf, -np.inf):
        head, data = taken_apart(whole_file())
        array = np.ones(shape, {"F64": np.float64, "F32": np.float32}[dtype])
        array.flat[-1] = bad
        assert f"tensor {name!r} has values that are not finite" in refused(head, data | {name: array.tobytes()})
    head, data = taken_apart(whole_file())
    if "spectrum" not in name and "factor" not in name:
        del data[name]
        assert f"tensor {name!r} is not in the file" in refused(head, data)
    head, data = taken_apart(whole_file())
    head["else"], data["else"] = head[name], data[name]
    assert "tensor 'else' belongs to no statistic of the header" in refused(head, data)


@pytest.mark.parametrize("where", ["model_name", "layer", "provenance", "left_out"])
def test_half_characters_in_the_header_are_refused(where, tmp_path):
    """They come through JSON, and no file and no answer of the server can carry them on."""
    half, spec, found = "a\ud800b", ModelSpec("m", 10, LAYERS), statistics()
    if where == "model_name":
        spec = dataclasses.replace(spec, model_name=half)
    elif where == "layer":
        spec = dataclasses.replace(spec, layers=[dataclasses.replace(LAYERS[0], name=half), LAYERS[1]])
        found = statistics(layers=(LayerStatistics(half, {"lora": GOOD}), found.layers[1]))
    elif where == "provenance":
        found = statistics(provenance={"x": [{half: 1}]})
    else:
        spec = dataclasses.replace(spec, left_out={half: "why"})
    path = tmp_path / "s.safetensors"
    path.write_bytes(statistics_to_bytes(spec, found))
    with pytest.raises(ActivationCacheError, match="half a character") as caught:
        load_statistics(path)
    str(caught.value).encode()
    whole = dataclasses.replace(ModelSpec("m", 10, LAYERS), model_name="a\U0001f600b \\ud800")
    path.write_bytes(statistics_to_bytes(whole, statistics()))
    assert load_statistics(path)[0].model_name == "a\U0001f600b \\ud800"


def test_a_statistic_that_may_be_infinite_is_kept_so(tmp_path):
    name = "boundless"
    STATISTICS.register(name, Statistic(name, lambda place: (), finite=False))
    try:
        spec, values = ModelSpec("m", 10, LAYERS), {"extra": {f"{name}.x": np.array([np.inf, 1.0])}}
        path = tmp_path / "s.safetensors"
        path.write_bytes(statistics_to_bytes(spec, statistics(**one_layer(**values))))
        found = load_statistics(path)[1].layers[1].by_method["lora"].value(f"{name}.x")
        np.testing.assert_array_equal(found, [np.inf, 1.0])
    finally:
        STATISTICS.unregister(name)


def test_what_a_statistic_gives_is_kept_as_it_is_declared():
    statistic = Statistic("theirs", lambda place: (), fields=("energy",))
    found = statistic.named({"energy": 1.0, "count": np.array([1, 2]), "mean": np.float32([0.1])})
    assert {name: getattr(value, "dtype", None) for name, value in found.items()} == {
        "energy": None, "theirs.count": np.float64, "theirs.mean": np.float64,
    }  # fmt: skip
    with pytest.raises(ProfilingError, match="theirs gives phase as complex64; it must give float64"):
        statistic.named({"phase": np.ones(1, np.complex64)})
