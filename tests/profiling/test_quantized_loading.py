"""How quantized weights are loaded, and what is seen of a layer that cannot be trained through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quantized_bases import dense, write_fp8
from benchmarks.tiny_models import tokenizer
from layerlens.exceptions import ModelSpecError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.peft_refusals import refused_kind
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.quantized import KERNEL_MODE, is_quantized, keep_weights, weights_kept
from layerlens.integrations.quantized_loading import (
    loading_of,
    notes_on,
    passes_gradient,
    quantization_arguments,
    refuse_other_dtype,
)
from layerlens.sources import load_pretrained


class Packed(torch.nn.Module):
    """A layer as GPTQ's: its weight lies in buffers, codes of 8 bits times a scale."""

    def __init__(self, n_in: int = 8, n_out: int = 6, kernel: str = "usual") -> None:
        super().__init__()
        self.in_features, self.out_features, self.kernel = n_in, n_out, kernel
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randint(-8, 8, (n_out, n_in), generator=generator, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if self.kernel == "bfloat16" else x.dtype
        y = x @ (0.1 * self.codes.to(dtype)).T
        if self.kernel == "half":  # a part of its product goes through numbers that are rounded
            return 0.5 * y + 0.5 * y.detach()
        return y.detach() if self.kernel == "inference" else y


def model_of(kernel: str) -> torch.nn.Module:
    return torch.nn.Sequential(Packed(kernel=kernel), torch.nn.Linear(6, 2))


@pytest.mark.parametrize(("kernel", "right"), [("usual", True), ("half", False), ("inference", False)])
def test_a_kernel_without_a_right_gradient_is_said(kernel: str, right: bool) -> None:
    model = model_of(kernel)
    assert is_quantized(model[0])
    assert passes_gradient(model[0]) is right
    notes = notes_on(model, {"quant_method": "mine"})
    assert bool(notes) is not right
    assert right or "Packed (1 layers, 0 ...) does not pass on correct gradients" in notes[0]


def test_the_dtype_that_a_layer_takes_is_said() -> None:
    refuse_other_dtype(model_of("usual"), torch.float32)
    with pytest.raises(ModelSpecError, match=r"model.dtype: Packed \(0\) cannot multiply float32; set .*: bfloat16"):
        refuse_other_dtype(model_of("bfloat16"), torch.float32)


def test_a_layer_without_parameters_is_refused_by_what_peft_says() -> None:
    assert "refuses Packed: Target module Packed() is not supported" in refused_kind(Packed(), "LoraConfig", r=1)
    assert refused_kind(torch.nn.Linear(2, 2), "LoraConfig", r=1) == ""


def test_transformers_is_told_of_a_kernel_for_training() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "meta": {}}
    assert loading_of(None, gptq) == {"quant_method": "gptq", "bits": 4, "backend": "auto_trainable"}
    assert loading_of({**gptq, "backend": "torch"}, None)["backend"] == "torch"
    assert loading_of(None, {"quant_method": "compressed-tensors"})["dequantize"] is True
    assert loading_of(None, {"quant_method": "fp8"}) == {}
    assert loading_of(None, None) == {}


def test_layers_of_gptqmodel_keep_their_kernel() -> None:
    """Its layer for the CPU repacks itself in the first call without a gradient, unless its mode is "train"."""
    model = model_of("usual")
    setattr(model[0], KERNEL_MODE, None)
    with weights_kept(model):
        assert getattr(model[0], KERNEL_MODE) == "train"
    assert getattr(model[0], KERNEL_MODE) is None
    keep_weights(model)
    assert getattr(model[0], KERNEL_MODE) == "train"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has FP8")
def test_weights_that_are_unpacked_as_they_load_are_said(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_pretrained(str(tmp_path / "model"), "causal-lm", [])
    assert "quantized (fp8), and loading unpacked them to float32" in loaded.notes[0]
    expected = dense().get_input_embeddings().weight
    torch.testing.assert_close(loaded.model.get_input_embeddings().weight, expected, rtol=0.01, atol=0.001)
    assert load_pretrained(str(tmp_path / "model"), "causal-lm", [], dtype="bfloat16").notes


def test_dora_on_eight_bits_is_left_out_by_name(tmp_path: Path) -> None:
    import transformers as hf

    dense().save_pretrained(tmp_path)
    for asked, refused in (({"load_in_8bit": True}, True), ({"load_in_4bit": True}, False)):
        told: dict[str, Any] = quantization_arguments(asked)
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **told)
        spec = model_spec(PretrainedModel(model, None, "", ()), "test", methods=("lora", "dora"))
        said = spec.left_out.get("model.layers.0.self_attn.q_proj (DoRA)", "")
        assert ("loses the scales of bitsandbytes' 8-bit weights" in said) is refused
        assert all(("dora" in layer.methods) is not refused for layer in spec.layers if layer.layer_type == "linear")
