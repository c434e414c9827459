"""rsLoRA's scale, and LoRA's first A from data: the right subspaces, B = 0, and the same start from the export."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from shapes import plan, shape

from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import lora_config
from layerlens.tuning import CalibrationBatch, apply, export_adapter, initial_factors, load, read_factors
from layerlens.tuning import initialization as module

LORA_SHAPES = ("bert", "gpt2", "llama", "t5", "vit")


def batches(base, count=3):
    """The shape's inputs, some of them with padding."""
    found = []
    for index in range(count):
        inputs = {
            key: value if value.is_floating_point() or key == "labels" else (value + 7 * index) % 49 + 1
            for key, value in base.inputs.items()
        }
        if "input_ids" in inputs:
            mask = torch.ones_like(inputs["input_ids"])
            mask[0, 5:] = 0
            inputs["attention_mask"] = mask
        else:
            inputs["pixel_values"] = inputs["pixel_values"] + index
        found.append(CalibrationBatch(inputs))
    return found


def lora_only(base, kind, **lora):
    choice = {name: option for name, option in base.choice.items() if option[0] == "lora"}
    return plan(base.model, choice, lora={"initialization": kind, **lora})


def inputs_and_gradients(base, name):
    """What the layer saw, padding left out, and the gradient of the summed loss: by autograd and a plain hook."""
    target, rows = base.model.get_submodule(name), []

    def hook(layer, args, output):
        keep = mask.bool() if mask is not None and args[0].shape[:-1] == mask.shape else ...
        rows.append(args[0][keep].flatten(0, -2) if keep is ... else args[0][keep])

    handle = target.register_forward_hook(hook)
    base.model.zero_grad()
    for batch in batches(base):
        mask = batch.inputs.get("attention_mask")
        base.model(**batch.inputs).loss.backward()
    handle.remove()
    gradient = target.weight.grad.T if hasattr(target, "nx") else target.weight.grad
    return torch.cat(rows).detach().double(), gradient.double()


@pytest.mark.parametrize("kind", ["pca", "gradient_svd"])
@pytest.mark.parametrize("architecture", LORA_SHAPES)
def test_rows_span_the_leading_subspace(architecture, kind):
    base = shape(architecture)
    manifest = lora_only(base, kind)
    flags = [parameter.requires_grad for parameter in base.model.parameters()]
    factors = initial_factors(base.model, manifest, batches(base))
    assert [parameter.requires_grad for parameter in base.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in base.model.parameters())
    for row in manifest.choice.lora_options:
        a = factors[row.layer].double()
        # Orthonormal in float64, rounded to float32: each of n products is off by 2^-24, n ≤ 48.
        torch.testing.assert_close(a @ a.T, torch.eye(row.rank, dtype=torch.float64), rtol=0, atol=48 * 2**-23)
        rows, gradient = inputs_and_gradients(base, row.layer)
        matrix = rows - rows.mean(dim=0) if kind == "pca" else gradient
        values = torch.linalg.svdvals(matrix)
        captured, best = (matrix @ a.T).square().sum(), values[: row.rank].square().sum()
        # What the rows capture is within the float32 rounding of the covariance of the best possible.
        assert best * (1 - 1e-4) <= captured <= best * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["pca", "gradient_svd"])
@pytest.mark.parametrize("architecture", LORA_SHAPES)
def test_step_0_changes_nothing_and_the_export_is_the_same_start(architecture, kind, tmp_path):
    base = shape(architecture)
    before = base.logits()
    manifest = lora_only(base, kind)
    factors = initial_factors(base.model, manifest, batches(base))
    written = export_adapter(manifest, base.model, tmp_path, factors)
    again = read_factors(written["peft"], manifest)
    assert all(torch.equal(again[layer], factor) for layer, factor in factors.items())
    tuned = apply(base.model, manifest, factors=again)
    assert (base.logits(tuned) - before).abs().max() == 0.0
    fresh = shape(architecture)
    loaded = load(fresh.model, tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tuned.state_dict().items() if "lora_" in name)
    text = (written["peft"] / "README.md").read_text()
    assert ("principal components" if kind == "pca" else "mean gradient") in text


def test_convolutions_too():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(6 * 64, 2))
    model.forward = lambda pixels: torch.nn.Sequential.forward(model, pixels)
    pixels = torch.randn(4, 3, 8, 8)
    batch = CalibrationBatch({"pixels": pixels}, lambda output: output.square().sum())
    manifest = plan(model, {"0": ("lora", 2)}, lora={"initialization": "gradient_svd"})
    a = initial_factors(model, manifest, [batch])["0"].double()
    model(pixels).square().sum().backward()
    gradient = model[0].weight.grad.flatten(1).double()
    best = torch.linalg.svdvals(gradient)[:2].square().sum()
    torch.testing.assert_close((gradient @ a.T).square().sum(), best, rtol=1e-5, atol=0)
    patches = torch.nn.functional.unfold(pixels, 3, padding=1).mT.flatten(0, 1).double()
    pca = dataclasses.replace(manifest.lora, initialization="pca")
    a = initial_factors(model, dataclasses.replace(manifest, lora=pca), [batch])
    centred = patches - patches.mean(dim=0)
    best = torch.linalg.svdvals(centred)[:2].square().sum()
    torch.testing.assert_close((centred @ a["0"].double().T).square().sum(), best, rtol=1e-4, atol=0)
    tuned = apply_plain(model, manifest, a)
    assert tuned[0].lora_A["default"].weight.shape == (2, 3, 3, 3)


def apply_plain(model, manifest, factors):
    apply(model, manifest, factors=factors)
    return model


def test_several_passes_give_what_one_gives(monkeypatch):
    base = shape("bert")
    manifest = lora_only(base, "gradient_svd")
    one = initial_factors(base.model, manifest, batches(base))
    monkeypatch.setattr(module, "MATRIX_BYTES", 1)
    several = initial_factors(base.model, manifest, batches(base))
    assert one.keys() == several.keys()
    assert all(torch.equal(one[layer], several[layer]) for layer in one)


def test_directions_that_the_data_leaves_open_are_filled():
    base = shape("bert")
    name = "bert.encoder.layer.0.attention.self.query"
    few = [CalibrationBatch({"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([0])})]
    manifest = plan(base.model, {name: ("lora", 6)}, lora={"initialization": "pca"})
    a = initial_factors(base.model, manifest, few)[name].double()  # two tokens: one direction around their mean
    torch.testing.assert_close(a @ a.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank():
    base = shape("bert")
    manifest = lora_only(base, "default", use_rslora=True)  # ranks 2 and 4, alpha/r = 2
    config = lora_config(manifest.choice, base.model)
    assert (config.r, config.lora_alpha, config.alpha_pattern, config.use_rslora) == (4, 8, {}, True)
    tuned = apply(base.model, manifest)
    scales = {layer.r["default"]: layer.scaling["default"] for layer in tuned.modules() if hasattr(layer, "lora_A")}
    assert scales == {2: 8 / 2**0.5, 4: 8 / 4**0.5}


def test_refusals_say_what_is_missing(tmp_path):
    base = shape("bert")
    manifest = lora_only(base, "pca")
    with pytest.raises(ManifestError, match=r"lora.initialization: 'pca' needs factors measured"):
        apply(base.model, manifest)
    with pytest.raises(ManifestError, match="no initial factor given"):
        apply(base.model, manifest, factors={})
    wrong = {row.layer: torch.zeros(1, 1) for row in manifest.allocations}
    with pytest.raises(ManifestError, match=r"the initial factor is \(1, 1\), needed is \(2, 32\)"):
        apply(base.model, manifest, factors=wrong)
    with pytest.raises(ManifestError, match="needs at least one batch"):
        initial_factors(base.model, manifest, [])
    with pytest.raises(ManifestError, match="keep the peft directory beside the manifest"):
        read_factors(tmp_path, manifest)
    unlabelled = CalibrationBatch({"input_ids": base.inputs["input_ids"]})
    with pytest.raises(ManifestError, match="needs labels"):
        initial_factors(base.model, lora_only(base, "gradient_svd"), [unlabelled])
    with pytest.raises(ManifestError, match=r"lora.use_rslora: must be true or false, got 'yes'"):
        apply(base.model, lora_only(base, "default", use_rslora="yes"))
    assert not any("lora" in name for name, _ in base.model.named_modules())
