"""LoRA, an adapter and prefixes in one model of each shape: nothing moves at step 0, it trains, saves and generates."""

from __future__ import annotations

import copy

import pytest
import torch
from shapes import SHAPES, assert_the_loss_falls_along_its_gradient, plan, shake, shape, train

from layerlens.config import TrainingConfig
from layerlens.integrations.pretrained import weights_fingerprint
from layerlens.tuning import apply, load, save, unapply
from layerlens.tuning.samples import TrainingData
from layerlens.tuning.training import fine_tune

GENERATORS = ("gpt2", "llama", "t5")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_a_mixture_starts_at_zero_trains_what_it_costs_and_comes_back_from_disk(architecture, attention, tmp_path):
    base = shape(architecture, attention)
    before = base.logits()
    manifest = plan(base.model, base.choice, kv_width=base.kv_width)
    tuned = apply(base.model, manifest)
    assert (base.logits(tuned) - before).abs().max() == 0.0

    trained = {name: value.numel() for name, value in tuned.named_parameters() if value.requires_grad}
    for row in manifest.allocations:
        mine = [name for name in trained if f".{row.layer}.lora_" in name or f"{row.layer}.layerlens_" in name]
        assert sum(trained.pop(name) for name in mine) == row.cost, row
    assert all(f".{head}." in name for name in trained for head in manifest.model.head_modules)
    assert bool(trained) == bool(manifest.model.head_modules)

    assert_the_loss_falls_along_its_gradient(tuned, base.inputs)
    train(tuned, base.inputs, steps=4)
    assert_the_loss_falls_along_its_gradient(tuned, base.inputs)  # now both halves of each option have gradients
    shake(tuned)
    expected = base.logits(tuned)
    assert (expected - before).abs().max() > 1e-2
    save(tuned, tmp_path)
    fresh = shape(architecture, attention)
    loaded = load(fresh.model, tmp_path)
    assert (fresh.logits(loaded) - expected).abs().max() == 0.0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", GENERATORS)
def test_text_with_a_cache_is_the_text_without(architecture, attention):
    base = shape(architecture, attention)
    tuned = apply(base.model, plan(base.model, base.choice, kv_width=base.kv_width))
    shake(tuned)
    tuned.eval()
    tokens = base.inputs["input_ids"]
    texts = [
        tuned.generate(input_ids=tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert texts[0].shape[1] == (13 if architecture == "t5" else tokens.shape[1] + 12)
    assert torch.equal(*texts)
    plain = shape(architecture, attention).model.generate(
        input_ids=tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    assert not torch.equal(plain, texts[0])  # else the options did nothing


@pytest.mark.parametrize("architecture", SHAPES)
def test_unapply_gives_the_base_model_back(architecture):
    base = shape(architecture)
    base.model.requires_grad_(False)
    first = next(base.model.parameters()).requires_grad_(True)
    names = [name for name, _ in base.model.named_modules()]
    before, weights = base.logits(), weights_fingerprint(base.model)
    implementation = base.model.config._attn_implementation
    tuned = apply(base.model, plan(base.model, base.choice, kv_width=base.kv_width))
    train(copy.deepcopy(tuned), base.inputs)  # a copy has nothing to do with it
    train(tuned, base.inputs)
    again = unapply(tuned)
    assert again is base.model
    assert [name for name, _ in again.named_modules()] == names
    assert weights_fingerprint(again) == weights
    assert (base.logits(again) - before).abs().max() == 0.0
    assert again.config._attn_implementation == implementation
    assert [parameter for parameter in again.parameters() if parameter.requires_grad] == [first]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in again.modules())
    apply(again, plan(again, base.choice, kv_width=base.kv_width))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "vit"])
def test_bfloat16_bases_keep_their_logits_and_come_back_from_disk(architecture, tmp_path):
    def in_bfloat16():
        base = shape(architecture)
        base.model.to(torch.bfloat16)
        inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in base.inputs.items()}
        base.inputs.update(inputs)
        return base

    base = in_bfloat16()
    before = base.logits()
    tuned = apply(base.model, plan(base.model, base.choice, kv_width=base.kv_width))
    assert (base.logits(tuned) - before).abs().max() == 0.0
    train(tuned, base.inputs)
    expected = base.logits(tuned)
    assert expected.isfinite().all()
    save(tuned, tmp_path)
    fresh = in_bfloat16()
    assert (fresh.logits(load(fresh.model, tmp_path)) - expected).abs().max() == 0.0


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("methods", [("lora", "adapter", "prefix"), ("adapter", "prefix")])
def test_checkpointing_gives_the_same_gradients(architecture, reentrant, methods):
    gradients = []
    for checkpointing in (False, True):
        base = shape(architecture)
        choice = {name: option for name, option in base.choice.items() if option[0] in methods}
        if checkpointing:
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        tuned = apply(base.model, plan(base.model, choice, kv_width=base.kv_width))
        shake(tuned)
        tuned.double()  # T5's wide weights amplify the rounding of sums in another order
        for module in tuned.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in base.inputs.items()}
        tuned.train()(**inputs, **({} if architecture == "vit" else {"use_cache": False})).loss.backward()
        gradients.append({name: value.grad for name, value in tuned.named_parameters() if value.requires_grad})
        assert all(value is not None for value in gradients[-1].values())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()), msg=name
        )


def test_the_whole_way_of_one_mixed_manifest(tmp_path):
    """LoRA, adapter and prefixes through Trainer, to disk, back with the same bits, text with a cache and without."""
    base = shape("llama")
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 50, (6 + index % 4,), generator=generator) for index in range(16)]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
    tuned = apply(base.model, plan(base.model, base.choice, kv_width=base.kv_width))
    result = fine_tune(
        tuned, TrainingData(samples, samples[:4]), TrainingConfig(epochs=3, batch_size=4, learning_rate=1e-2),
        task="causal-lm", checkpoints=tmp_path / "checkpoints",
    )  # fmt: skip
    assert result.losses[-1] < result.losses[0]
    expected = base.logits(tuned)
    save(tuned, tmp_path / "tuned")
    fresh = shape("llama")
    loaded = load(fresh.model, tmp_path / "tuned").eval()
    assert (fresh.logits(loaded) - expected).abs().max() == 0.0
    options = {"input_ids": base.inputs["input_ids"], "max_new_tokens": 16, "do_sample": False}
    texts = [loaded.generate(**options, use_cache=cache) for cache in (True, False)]
    assert texts[0].shape[1] == base.inputs["input_ids"].shape[1] + 16
    assert torch.equal(*texts)
    assert torch.equal(texts[0], tuned.generate(**options))
