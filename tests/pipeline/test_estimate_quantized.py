"""``estimate`` of quantized models: the bytes that loading the same model comes to, without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quantized_bases import dense, write_fp8
from layerlens.integrations.quantized import weight_bytes
from layerlens.integrations.quantized_loading import quantization_arguments
from layerlens.integrations.quantized_sizes import storage_of
from layerlens.jobs.estimate import Batch, Estimate, estimate_lora

LAYERS, N_IN, N_OUT = 14, 128, 256
ASKED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
NOTED = 200
"""Bytes at most by which a layer differs: bitsandbytes saves a few lines of JSON with each."""


def base_bytes(found: Estimate, activations: float) -> float:
    return 1e9 * found.resources[2].base - activations


def activations_of(model: Any, folder: Path) -> float:
    """What a step keeps beside the weights, which are those of the dense model in both estimates."""
    model.save_pretrained(folder)
    return 1e9 * estimate_lora(str(folder), 4, batch=Batch(2, 16)).resources[2].base - weight_bytes(model)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("files", [True, False], ids=["files", "configuration"])
def test_the_weights_are_those_of_the_quantized_model(name: str, files: bool, tmp_path: Path) -> None:
    import transformers as hf

    model = dense()
    kept = activations_of(model, tmp_path / "dense")
    told: dict[str, Any] = quantization_arguments(ASKED[name])
    quantized = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, **told)
    quantized.save_pretrained(tmp_path / "quantized")
    place = tmp_path / "quantized"
    if not files:
        place = tmp_path / "only" / "config.json"
        place.parent.mkdir()
        place.write_text((tmp_path / "quantized" / "config.json").read_text())
    found = estimate_lora(str(place), 4, batch=Batch(2, 16))
    assert base_bytes(found, kept) == pytest.approx(weight_bytes(quantized), abs=LAYERS * NOTED)
    assert base_bytes(found, kept) < 0.6 * weight_bytes(model)
    said = "as they lie in the files" if files else "bits) are counted with their scales"
    assert any(said in note for note in found.notes)
    assert found.base_params == sum(x.numel() for x in model.parameters())


def test_fp8_is_counted_as_each_device_holds_it(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    kept = activations_of(dense(), tmp_path / "dense")
    found = {on: estimate_lora(str(tmp_path / "model"), 4, batch=Batch(2, 16, on)) for on in ("cpu", "gpu")}
    assert base_bytes(found["cpu"], kept) == pytest.approx(weight_bytes(dense()))
    assert any("unpacked as they load on a CPU" in note for note in found["cpu"].notes)
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    blocks = 2 * (4 * 1 + 3 * 2)
    assert base_bytes(found["gpu"], kept) == pytest.approx(weight_bytes(dense()) - 3 * weights + 4 * blocks)


def test_a_format_whose_size_is_not_known_is_said(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path / "dense")
    said = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "higgs"}}))
    found = estimate_lora(str(tmp_path / "config.json"), 4, batch=Batch(2, 16))
    assert any("The size of weights in higgs is not known" in note for note in found.notes)


@pytest.mark.parametrize(
    ("said", "expected"),
    [  # by hand: 256 rows of 128 weights
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 128 * 256 / 2 + 4 * 256 * 2.5 + 4 * 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 128 * 256 / 2 + 256 * 2.5),
        ({"quant_method": "hqq", "nbits": 4, "group_size": 64}, 128 * 256 / 2 + 512 * 4),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 128 * 256 + 2 * 4),
        ({"quant_method": "quanto", "weights": "int8"}, 128 * 256 + 256 * 4),
    ],
)
def test_bits_and_scales_of_a_layer(said: dict[str, Any], expected: float) -> None:
    storage = storage_of(said)
    assert storage is not None
    assert storage.bytes_of(N_IN, N_OUT) == expected
