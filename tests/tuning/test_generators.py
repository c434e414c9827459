"""Generated LoRA: starts at zero, trains end to end, ends as ordinary LoRA; a plug-in as an installed package."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from shapes import assert_the_loss_falls_along_its_gradient, plan, shape, train

from layerlens.exceptions import ManifestError
from layerlens.models import LoraSettings
from layerlens.tuning import apply, load, merge, save, unapply
from layerlens.tuning.generators import attach_generator, finish_generator, known_generators, use_task
from layerlens.tuning.generators.generator import has_generator

PLUGIN = '''
import torch


class PerLayer(torch.nn.Module):
    """A vector for each layer that scales fixed random factors."""

    def __init__(self, layers, tasks=1, seed=0):
        super().__init__()
        self.layers = layers
        generator = torch.Generator().manual_seed(seed)
        self.a = {l.name: torch.randn(l.rank, l.n_in, generator=generator) for l in layers}
        self.b = {l.name: torch.randn(l.n_out, l.rank, generator=generator) for l in layers}
        self.scale = torch.nn.Parameter(torch.zeros(tasks, len(layers)))

    def forward(self, task):
        return {l.name: (self.a[l.name], self.b[l.name] * self.scale[task, i]) for i, l in enumerate(self.layers)}
'''
ENTRY_POINTS = """
[layerlens.generators]
per-layer = per_layer_generator:PerLayer
broken = per_layer_generator:Missing
"""


def lora_choice(base):
    return {name: option for name, option in base.choice.items() if option[0] == "lora"}


def generated(architecture="bert", choice=None, **lora):
    base = shape(architecture)
    manifest = plan(base.model, choice or base.choice, kv_width=base.kv_width, lora={"generator": "hyperlora", **lora})
    return base, manifest, apply(base.model, manifest)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit"])
def test_it_starts_at_zero_trains_and_ends_as_ordinary_lora(architecture, tmp_path):
    base = shape(architecture)
    before = base.logits()
    base, manifest, model = generated(architecture)
    assert (base.logits(model) - before).abs().max() == 0.0
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert not any("lora_" in name for name in trained)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert_the_loss_falls_along_its_gradient(model, base.inputs)
    train(model, base.inputs, steps=4)
    assert_the_loss_falls_along_its_gradient(model, base.inputs)  # now embeddings have gradients too
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert {name for name in trained if "layerlens_generator" in name} <= moved  # end to end, embeddings too
    assert moved <= trained

    expected = base.logits(model)
    assert (expected - before).abs().max() > 1e-4
    save(model, tmp_path)
    assert has_generator(model)  # saving has changed nothing
    assert torch.equal(base.logits(model), expected)
    fresh = shape(architecture)
    loaded = load(fresh.model, tmp_path)
    assert not has_generator(loaded)
    assert (fresh.logits(loaded) - expected).abs().max() == 0.0

    finish_generator(model)
    assert (base.logits(model) - expected).abs().max() == 0.0
    mine = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert sum(value.numel() for value in mine.values()) == sum(
        row.cost for row in manifest.allocations if row.method == "lora"
    )
    assert all(value.requires_grad for value in mine.values())
    train(model, base.inputs)  # it is ordinary LoRA and can be trained on


def test_stock_peft_reads_what_was_generated(tmp_path):
    from peft import PeftModel

    base = shape("bert")
    base, _, model = generated(choice=lora_choice(base))
    train(model, base.inputs, steps=3)
    save(model, tmp_path)
    fresh = shape("bert")
    assert torch.equal(fresh.logits(PeftModel.from_pretrained(fresh.model, str(tmp_path))), base.logits(model))


def test_checkpoints_of_activations_and_generation(tmp_path):
    base, _, model = generated("llama")
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = {**base.inputs, "use_cache": False}
    train(model, inputs, steps=4)
    assert_the_loss_falls_along_its_gradient(model, inputs, train=True)  # activations are checkpointed in training mode
    base.model.gradient_checkpointing_disable()
    tokens = base.inputs["input_ids"]
    texts = [
        model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*texts)


def test_tasks_share_a_network_and_differ():
    base = shape("bert")
    manifest = plan(base.model, lora_choice(base))
    model = attach_generator(apply(base.model, manifest), "hyperlora", tasks=2, seed=5)
    for task in (0, 1):
        use_task(model, task)
        train(model, {**base.inputs, "labels": (base.inputs["labels"] + task) % 3}, steps=3)
    outputs = []
    for task in (0, 1):
        use_task(model, task)
        outputs.append(base.logits(model))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    with pytest.raises(ManifestError, match="has none, so there is no task"):
        use_task(shape("bert").model, 0)


def test_unapply_and_merge():
    base = shape("bert")
    before = base.logits()
    base, _, model = generated(choice=lora_choice(base))
    train(model, base.inputs)
    expected = base.logits(model)
    torch.testing.assert_close(base.logits(merge(model)), expected, rtol=1e-4, atol=1e-4)  # one more float32 rounding
    base, _, model = generated(choice=lora_choice(base))
    train(model, base.inputs)
    assert (base.logits(unapply(model)) - before).abs().max() == 0.0


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory):
    """A package with a generator, as a wheel that pip installs into a directory on sys.path."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    wheel = source / "per_layer_generator-1.0-py3-none-any.whl"
    about = "per_layer_generator-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("per_layer_generator.py", PLUGIN)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: per-layer-generator\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/entry_points.txt", ENTRY_POINTS)
        archive.writestr(f"{about}/RECORD", "")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    done = subprocess.run([*pip, target, wheel], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(target))
    yield Path(target)
    sys.path.remove(str(target))


def test_a_plug_in_is_an_installed_package(plugin, tmp_path):
    assert known_generators() == ("hyperlora", "broken", "per-layer")
    base, _, model = generated(generator="per-layer")
    before = shape("bert").logits()
    assert (base.logits(model) - before).abs().max() == 0.0
    train(model, base.inputs, steps=4)
    assert_the_loss_falls_along_its_gradient(model, base.inputs)
    expected = base.logits(model)
    save(model, tmp_path)
    fresh = shape("bert")
    assert (fresh.logits(load(fresh.model, tmp_path)) - expected).abs().max() == 0.0
    with pytest.raises(ManifestError, match=r"'broken' \(per_layer_generator:Missing\) cannot be imported"):
        generated(generator="broken")
    with pytest.raises(ManifestError, match="'per-layr' is not known, did you mean 'per-layer'"):
        generated(generator="per-layr")


def test_without_a_plug_in_only_the_built_in_one_is_known():
    assert known_generators() == ("hyperlora",)
    base = shape("bert")
    manifest = plan(base.model, lora_choice(base), lora={"generator": "other"})
    with pytest.raises(ManifestError, match="'other' is not known; known: hyperlora"):
        apply(base.model, manifest)
    apply(base.model, dataclasses.replace(manifest, lora=LoraSettings(2.0)))  # the model is as it was


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda factors: {}, "gives no factors for bert.encoder"),
        (lambda factors: {name: (b, a) for name, (a, b) in factors.items()}, "factors of .* needed are"),
        (lambda factors: {name: (a, b + 1) for name, (a, b) in factors.items()}, "must begin with finite A and B = 0"),
        (lambda factors: {name: (a * float("nan"), b) for name, (a, b) in factors.items()}, "must begin with finite A"),
    ],
)
def test_a_faulty_generator_is_refused_and_leaves_the_model_alone(monkeypatch, fault, message):
    from layerlens.tuning.generators.hyperlora import HyperLora

    real = HyperLora.forward
    monkeypatch.setattr(HyperLora, "forward", lambda self, task: fault(real(self, task)))
    base = shape("bert")
    model = apply(base.model, plan(base.model, lora_choice(base)))
    with pytest.raises(ManifestError, match=message):
        attach_generator(model, "hyperlora")
    assert not has_generator(model)
    assert sum(value.requires_grad for name, value in model.named_parameters() if "lora_" in name) == 4
    with pytest.raises(ManifestError, match="needs LoRA layers"):
        attach_generator(shape("bert").model, "hyperlora")
