"""Every parameter is accounted for exactly once: in a layer on offer, in the head, or left out with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.tiny_models import Architecture, architectures, model_of
from layerlens.integrations.layers import model_spec
from layerlens.integrations.parameter_account import FROZEN_HEAD, HEAD, OFFERED, account_of, parameters_of
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.quantized import parameter_count
from layerlens.models import ModelSpec

TRIED = (
    "bert", "gpt2", "llama", "opt", "t5", "bart", "mixtral", "qwen3_moe", "gpt_oss", "mamba", "bloom", "falcon",
    "deberta-v2", "gemma3_text", "albert",
)  # fmt: skip
"""Of each kind one."""


def checked(model: nn.Module, heads: tuple[str, ...] = (), **options: Any) -> tuple[ModelSpec, dict[str, str]]:
    """The layers, and the status of every parameter, after everything was held against the model's own count."""
    spec = model_spec(PretrainedModel(model, None, "model", ()), "model", **options)
    found = list(parameters_of(model, spec, heads))
    assert len({name for name, _, _ in found}) == len(found)
    assert {name for name, _, _ in found} >= {name for name, _ in model.named_parameters()}
    sums = account_of(model, spec, heads)
    assert sums["offered"] + sums["head"] + sum(sums["left_out"].values()) == parameter_count(model)
    assert sum(n for _, n, _ in found) == parameter_count(model)
    assert all(status for _, _, status in found)
    return spec, {name: status for name, _, status in found}


@pytest.mark.parametrize("one", [x for x in architectures() if x.name in TRIED], ids=lambda one: one.key)
def test_language_models(one: Architecture):
    checked(model_of(one))


class Odd(nn.Module):
    """Everything that is no Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.place = nn.Parameter(torch.zeros(4, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.deep = nn.Conv3d(1, 2, 3)
        self.up = nn.ConvTranspose2d(2, 2, 2)
        self.image = nn.Conv2d(3, 4, 3)
        self.norm, self.batch = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.memory = nn.LSTM(8, 8)
        self.pair = nn.Bilinear(8, 8, 2)
        self.linear = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.linear.weight
        self.head = nn.Linear(8, 3)


def test_modules_of_every_kind_are_left_out_with_their_reasons():
    spec, status = checked(Odd(), ("head",))
    assert status["head.weight"] == status["head.bias"] == HEAD
    assert status["linear.weight"] == OFFERED
    assert "tied.weight" not in status  # it is the same parameter
    assert status["tied.bias"] == OFFERED
    for name in (
        "place", "up.weight", "attention.in_proj_weight", "other.q_proj_weight", "memory.weight_ih_l0", "pair.weight",
    ):  # fmt: skip
        assert name in spec.left_out, name
        assert status[name] == spec.left_out[name]
    assert "embedding" in status["embed.weight"]
    assert "norm" in status["norm.weight"]
    assert "norm" in status["batch.bias"]
    assert status["mix.weight"] == status["deep.weight"] == OFFERED
    assert "PEFT adapts in_proj_weight and out_proj only together" in status["attention.in_proj_weight"]
    assert "PEFT adapts in_proj_weight and out_proj only together" in status["attention.out_proj.weight"]
    assert "uses itself" in status["scale"]


def test_what_the_configuration_does_not_name_has_that_reason():
    model = model_of(next(one for one in architectures() if one.name == "llama"))
    _, status = checked(model, only=("q_proj",))
    assert {status[name] for name in status if "q_proj" in name} == {OFFERED}
    assert {status[name] for name in status if "up_proj" in name} == {"profiling.layers does not name it"}


def test_an_image_model_by_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    checked(model.eval(), ("head",), inputs={"x": torch.zeros(1, 3, 32, 32)})


def test_convolutions_of_a_models_own_head_are_said_to_stay():
    import transformers as hf

    config = hf.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, num_labels=3,
    )  # fmt: skip
    spec, status = checked(
        hf.DPTForSemanticSegmentation(config).eval(), inputs={"pixel_values": torch.zeros(1, 3, 32, 32)}
    )
    assert not [name for name in spec.left_out if ".convs." in name or "projection" in name]
    assert status["neck.convs.0.weight"] == status["head.head.4.weight"] == FROZEN_HEAD
