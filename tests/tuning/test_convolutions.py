"""LoRA on Conv2d: ResNet and ConvNeXt shapes, frozen running statistics, and what cannot take it."""

from __future__ import annotations

import pytest
import torch
from shapes import assert_the_loss_falls_along_its_gradient, plan, shake, train

from layerlens.exceptions import ManifestError
from layerlens.tuning import apply, load, merge, save, unapply


def resnet(seed=0):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config).eval()
    for module in model.modules():  # running statistics as of a trained model, not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return model


def convnext(seed=0):
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(seed)
    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4, num_labels=3, layer_scale_init_value=1.0
    )
    return ConvNextForImageClassification(config).eval()


MODELS = {"resnet": resnet, "convnext": convnext}


def convolutions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}


def inputs():
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": torch.tensor([0, 2])}


def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs()).logits.clone()


def choose(model):
    plain = [name for name, module in convolutions(model).items() if module.groups == 1]
    dense = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name: ("lora", 2 + index % 2) for index, name in enumerate(plain)} | {
        name: ("lora", 3) for name in dense if name.endswith("pwconv1")
    }


@pytest.mark.parametrize("architecture", MODELS)
def test_step_0_training_disk_merge_and_unapply(architecture, tmp_path):
    model = MODELS[architecture]()
    before = logits(model)
    manifest = plan(model, choose(model), head_modules=["classifier"], task="image-classification")
    tuned = apply(model, manifest)
    assert (logits(tuned) - before).abs().max() == 0.0
    trained = sum(value.numel() for name, value in tuned.named_parameters() if value.requires_grad and "lora_" in name)
    assert trained == sum(row.cost for row in manifest.allocations)

    assert_the_loss_falls_along_its_gradient(tuned, inputs())
    train(tuned, inputs(), steps=3)  # in training mode, where batch normalisation would update its statistics
    shake(tuned)
    expected = logits(tuned)
    save(tuned, tmp_path)
    assert (logits(load(MODELS[architecture](), tmp_path)) - expected).abs().max() == 0.0

    loaded = load(MODELS[architecture](), tmp_path)
    merged = merge(loaded)
    assert not any("lora" in name for name, _ in merged.named_modules())
    # A float32 sum of K·r + 1 products per weight is rounded once more; the layers pass it on with gains of order 1.
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    assert (logits(unapply(tuned)) - before).abs().max() == 0.0


def test_a_convolution_trains_r_times_its_patch_and_channels():
    model = resnet()
    name, module = next(iter(convolutions(model).items()))
    n_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    manifest = plan(model, {name: ("lora", 5)}, head_modules=[])
    assert manifest.allocations[0].cost == 5 * (n_in + module.out_channels)
    tuned = apply(model, manifest)
    assert sum(value.numel() for value in tuned.parameters() if value.requires_grad) == manifest.allocations[0].cost


def test_a_grouped_convolution_takes_multiples_of_its_groups_and_is_not_merged(tmp_path):
    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(8, 12, 3, groups=4, padding=1))

    pixels = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    model = build()
    before = model(pixels)
    manifest = plan(model, {"0": ("lora", 8)}, head_modules=[])
    assert manifest.allocations[0].cost == 8 * 8 * 9 + 8 // 4 * 12
    tuned = apply(model, manifest)
    assert sum(value.numel() for value in tuned.parameters() if value.requires_grad) == manifest.allocations[0].cost
    assert torch.equal(tuned(pixels), before)
    shake(tuned)
    expected = tuned(pixels)
    assert (expected - before).abs().max() > 1e-2
    save(tuned, tmp_path)
    assert torch.equal(load(build(), tmp_path)(pixels), expected)
    with pytest.raises(ManifestError, match="cannot be merged: 0 is a convolution of 4 groups"):
        merge(tuned)
    assert torch.equal(tuned(pixels), expected)
    with pytest.raises(ManifestError, match="rank 6 is not a multiple of the 4 groups"):
        apply(build(), plan(build(), {"0": ("lora", 6)}, head_modules=[]))


def test_depthwise_dilated_and_reflecting_convolutions_are_refused():
    grouped = next(name for name, module in convolutions(convnext()).items() if module.groups > 1)
    model = convnext()
    with pytest.raises(ManifestError, match=f"{grouped}: PEFT's LoRA of a depthwise convolution needs"):
        apply(model, plan(model, {grouped: ("lora", 8)}))
    for option in ({"dilation": 2}, {"padding_mode": "reflect", "padding": 1}):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, **option))
        with pytest.raises(ManifestError, match=r"0: PEFT's LoRA drops the (dilation|padding mode) of a convolution"):
            apply(model, plan(model, {"0": ("lora", 2)}))


class Normed(torch.nn.Module):
    """Norms that learn in a forward pass of training, beside a layer that takes LoRA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.utils.spectral_norm(torch.nn.Conv2d(3, 8, 3, padding=1))
        self.second = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(8, 8, 3, padding=1))
        self.norm, self.last = torch.nn.InstanceNorm2d(8, track_running_stats=True), torch.nn.Conv2d(8, 4, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.second(self.first(pixels).relu())).relu()).mean((2, 3))
        return out


def test_what_frozen_norms_have_learnt_stays_as_it_is(tmp_path):
    """It is in no adapter file, so a loaded adapter would meet other values than it was trained with."""
    base = Normed().eval()
    before = {name: value.clone() for name, value in base.named_buffers()}
    tuned = apply(base, plan(base, {"last": ("lora", 2)}))
    optimizer = torch.optim.SGD([one for one in tuned.parameters() if one.requires_grad], lr=0.1)
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        tuned.train()(pixels).square().sum().backward()
        optimizer.step()
    after = dict(base.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    save(tuned, tmp_path)
    loaded = load(Normed().eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels), tuned.eval()(pixels))
