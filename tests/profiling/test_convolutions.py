"""Convolutions as layers: the matrix that PEFT's LoRA can move, held against autograd through PEFT's own layer."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from brute_force import assert_equal, pieces, profile, sample_gradients, singles, weight_statistics
from peft import LoraConfig, get_peft_model
from test_architectures import CLASSES, RELATIVE, ConvNet, images

from layerlens.exceptions import ModelSpecError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.integrations.weight_matrices import why_no_lora
from layerlens.methods import enumerate_options, trainable_params
from layerlens.tasks import Batch
from layerlens.tasks.losses import classification_loss


def spec_of(model: torch.nn.Module, batch: Batch):
    return model_spec(PretrainedModel(model, None, "", ()), "test", inputs=batch.inputs)


@pytest.fixture
def batch() -> Batch:
    return Batch({"pixel_values": images()}, torch.arange(5) % CLASSES, torch.arange(5))


class Grouped(torch.nn.Module):
    """A plain, a strided and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1, stride=2), torch.nn.GELU(),
            torch.nn.Conv2d(8, 12, (3, 2), padding=(2, 1), groups=4, bias=False), torch.nn.GELU(),
            torch.nn.Conv2d(12, 6, 1), torch.nn.GELU(),
        )  # fmt: skip
        self.head = torch.nn.Linear(6, CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixel_values).mean(dim=(2, 3)))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_the_lora_of_a_convolution_is_measured_on_the_matrix_that_it_moves(batch: Batch):
    """∂loss/∂B = scale · Σ d (A z)ᵀ for each sample, and the measured ‖Σ d zᵀ‖² has z of PEFT's A.

    With a dense convolution of zeros beside the layer, which sees all input channels as PEFT's A does, the per-sample
    gradient of its weight is Σ d zᵀ itself.
    """
    torch.manual_seed(0)
    model = Grouped().double().eval()
    spec = spec_of(model, batch)
    assert [layer.name for layer in spec.layers] == ["features.0", "features.2", "features.4", "head"]
    statistics = profile(model, spec, pieces(batch, 2, 3), classification_loss, everything=False)
    for layer, found in zip(spec.layers[:3], statistics.layers, strict=False):
        beside = copy.deepcopy(model)
        conv = beside.get_submodule(layer.name)
        dense = torch.nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False
        ).double()
        torch.nn.init.zeros_(dense.weight)
        beside.add_module("dense", dense)
        conv.register_forward_hook(lambda module, args, output, dense=dense: output + dense(args[0]))
        each = torch.from_numpy(sample_gradients(beside, batch, classification_loss)["dense.weight"])
        measured = found.by_method["lora"]
        assert measured.trace == pytest.approx(float(each.square().sum(dim=1).mean()), rel=RELATIVE)
        assert measured.energy == pytest.approx(float(each.mean(dim=0).square().sum()), rel=RELATIVE)

        rank = 4
        tuned = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=rank, lora_alpha=rank, target_modules=[layer.name])
        ).double()
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) == trainable_params(layer, "lora", rank)
        a__rz, b = trained[0].flatten(1), trained[1]
        for one, gradient__oz in zip(singles(batch), each, strict=True):
            loss = classification_loss(tuned(**one.inputs), one).sum()
            (found_b,) = torch.autograd.grad(loss, [b])
            moved__or = gradient__oz.view(conv.out_channels, -1) @ a__rz.T.double()
            # B has a block for each group: outputs of group j see the j-th share of the ranks.
            share = rank // conv.groups
            blocks = moved__or.view(conv.groups, -1, conv.groups, share)
            expected = torch.cat([blocks[group, :, group] for group in range(conv.groups)])
            assert torch.allclose(found_b.flatten(1), expected, rtol=1e-9, atol=1e-12)


class Along(torch.nn.Module):
    """Convolutions along one and three axes, by their paddings, steps and groups; activations change in place."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = torch.nn.Sequential(
            torch.nn.Conv1d(2, 4, 5, stride=2, padding=1), torch.nn.ReLU(inplace=True),
            torch.nn.Conv1d(4, 6, 4, padding="same"), torch.nn.SiLU(inplace=True),
            torch.nn.Conv1d(6, 6, 3, dilation=2, groups=3),
        )  # fmt: skip
        self.volumes = torch.nn.Sequential(
            torch.nn.Conv3d(1, 4, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)), torch.nn.ReLU(inplace=True),
            torch.nn.Conv3d(4, 4, 2, groups=2, padding="valid"), torch.nn.Conv3d(4, 2, 2, dilation=(1, 2, 1)),
        )  # fmt: skip
        self.head = torch.nn.Linear(8, CLASSES)

    def forward(self, waves: torch.Tensor, volumes: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.waves(waves).mean(-1), self.volumes(volumes).flatten(2).mean(-1)], dim=-1))


def test_convolutions_along_one_and_three_axes_equal_one_backward_pass_for_each_sample():
    torch.manual_seed(0)
    model = Along().double().eval()
    inputs = {"waves": torch.randn(5, 2, 30).double(), "volumes": torch.randn(5, 1, 4, 9, 5).double()}
    several = Batch(inputs, torch.arange(5) % CLASSES, torch.arange(5))
    spec = spec_of(model, several)
    assert [layer.name for layer in spec.layers] == ["waves.0", "waves.2", "volumes.0", "volumes.2", "head"]
    assert spec.left_out == dict.fromkeys(("waves.4", "volumes.3"), "PEFT's LoRA drops the dilation of a convolution")
    assert [(layer.n_in, layer.positions) for layer in spec.layers[:3]] == [(10, 14), (16, 14), (18, 4 * 4 * 5)]
    found = profile(model, spec, pieces(several, 3, 2), classification_loss)
    assert_equal(found, sample_gradients(model, several, classification_loss), RELATIVE)
    weights = {name for name in weight_statistics(found) if name.startswith(("waves", "volumes"))}
    assert weights >= {f"waves.{n}.weight" for n in (0, 2, 4)} | {f"volumes.{n}.weight" for n in (0, 2, 3)}


def test_weights_of_grouped_layers_are_measured_beside_their_lora(batch: Batch):
    torch.manual_seed(0)
    model = Grouped().double().eval()
    statistics = profile(model, spec_of(model, batch), [batch], classification_loss)
    assert_equal(statistics, sample_gradients(model, batch, classification_loss), RELATIVE)
    assert "features.2.weight" in statistics.other_weights
    assert statistics.left_out.keys() == {"features.0.bias", "features.4.bias", "head.bias"}


def test_what_peft_cannot_do_is_left_out_by_name(batch: Batch):
    model = ConvNet().double().eval()
    spec = spec_of(model, batch)
    assert [layer.name for layer in spec.layers] == ["features.0", "head"]
    assert spec.left_out == {
        "features.2": "PEFT's LoRA drops the dilation of a convolution",
        "features.4": "PEFT's LoRA of a depthwise convolution needs a rank that is a multiple of its 12 groups",
    }
    reflecting = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert "padding" in why_no_lora("x", reflecting)
    only = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, groups=3), torch.nn.Flatten(1))
    with pytest.raises(ModelSpecError, match=r"no layer in Sequential that can take LoRA.*; 0: PEFT's LoRA of a depth"):
        model_spec(PretrainedModel(only, None, "", ()), "test")


def test_convolutions_whose_attributes_the_model_reads_are_left_out_since_pefts_have_none(batch: Batch):
    """MobileNetV2 of transformers asks its convolutions for the stride to pad as TensorFlow does; PEFT's has none."""
    torch.manual_seed(0)
    config = hf.MobileNetV2Config(image_size=8, depth_multiplier=0.25, num_labels=CLASSES)
    model = hf.MobileNetV2ForImageClassification(config).double().eval()
    with pytest.raises(ModelSpecError, match=r"the model's code reads its .*kernel_size and stride, which PEFT's LoRA"):
        spec_of(model, batch)
    assert type(model.mobilenet_v2.conv_stem.first_conv.convolution) is torch.nn.Conv2d

    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)
            self.head = torch.nn.Linear(4, CLASSES)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            hidden = torch.nn.functional.pad(self.first(pixel_values), [self.second.kernel_size[0] // 2] * 4)
            return self.head(self.second(hidden).mean(dim=(2, 3)))

    own = Padded().double().eval()
    spec = spec_of(own, batch)
    assert [layer.name for layer in spec.layers] == ["first", "head"]
    assert spec.left_out["second"].startswith("the model's code reads its kernel_size, which PEFT's")
    with torch.no_grad():
        get_peft_model(own, LoraConfig(r=1, target_modules=["first", "head"]))(**batch.inputs)


def test_ranks_of_a_grouped_convolution_are_multiples_of_its_groups(batch: Batch):
    model = Grouped().double()
    options = enumerate_options(spec_of(model, batch), {"lora": (1, 2, 4, 6, 8)})
    assert [option.rank for option in options if option.layer == "features.2"] == [0, 4, 8]


def test_blocks_of_a_convnet_are_its_residual_blocks_and_positions_its_pixels():
    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 2], num_labels=3)
    model = hf.ResNetForImageClassification(config).eval()
    spec = model_spec(PretrainedModel(model, None, "", ()), "test", inputs={"pixel_values": torch.randn(2, 3, 16, 16)})
    assert spec.per_sample
    blocks = {layer.name.removeprefix("resnet."): layer.block for layer in spec.layers}
    assert blocks["embedder.embedder.convolution"] is None
    assert len({block for block in blocks.values() if block is not None}) == 3
    assert not any(name.startswith("classifier") for name in blocks)
    first = spec.layers[0]
    assert (first.positions, first.input_elements, first.n_in) == (8 * 8, 3 * 16 * 16, 3 * 7 * 7)
