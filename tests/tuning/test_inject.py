"""apply(): nothing moves at step 0, exactly the counted parameters train, and each of them gets a gradient."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from shapes import assert_the_loss_falls_along_its_gradient

from layerlens.exceptions import ManifestError
from layerlens.integrations.peft import injected_ranks
from layerlens.integrations.torch_modules import find_module
from layerlens.methods import attached
from layerlens.models import Choice, LoraSettings, Provenance
from layerlens.tuning import apply, merge

ARCHITECTURES = ("bert", "gpt2", "llama")


def train(model, tokens, steps):
    """Adam with next to no epsilon: a parameter stands still only if its gradient is exactly zero."""
    labels = torch.arange(len(tokens)) % 3
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01, eps=1e-30)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=labels).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("methods", [("lora",), ("adapter",), ("prefix",), ("lora", "adapter", "prefix")])
def test_step_0_changes_no_logit(tiny, manifest_of, mixed, architecture, attention, methods):
    base = tiny(architecture, attention)
    before = base.logits()
    choice = {name: option for name, option in mixed(base.spec).items() if option[0] in methods}
    tuned = apply(base.model, manifest_of(base.spec, choice)).eval()
    assert (base.logits(tuned) - before).abs().max() == 0.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_trains_what_it_costs_and_nothing_else_trains(tiny, manifest_of, mixed, architecture):
    base = tiny(architecture)
    manifest = manifest_of(base.spec, mixed(base.spec))
    tuned = apply(base.model, manifest)
    trained = {name: parameter.numel() for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    for row in manifest.allocations:
        marks = (f".{row.layer}.lora_", f".{row.layer}.layerlens_")
        mine = [name for name in trained if any(mark in name for mark in marks)]
        assert sum(trained.pop(name) for name in mine) == row.cost, row
    (head,) = manifest.model.head_modules
    assert trained
    assert all(f"{head}.modules_to_save" in name for name in trained)
    assert injected_ranks(tuned) == {row.layer: row.rank for row in manifest.allocations if row.method == "lora"}


def test_without_lora_the_model_itself_comes_back_with_its_head_trainable(tiny, manifest_of, mixed):
    base = tiny("bert")
    choice = {name: option for name, option in mixed(base.spec).items() if option[0] != "lora"}
    tuned = apply(base.model, manifest_of(base.spec, choice))
    assert tuned is base.model
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "layerlens" not in name} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_new_parameter_moves_and_no_frozen_one_does(tiny, manifest_of, mixed, architecture):
    base = tiny(architecture)
    manifest = manifest_of(base.spec, mixed(base.spec))
    tuned = apply(base.model, manifest).train()
    start = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    moved = lambda: {name for name, value in tuned.named_parameters() if not torch.equal(value, start[name])}  # noqa: E731
    trainable = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}

    train(tuned, base.tokens, steps=1)
    # After one step the zero-initialised halves have moved; what they multiply moves from the second step on.
    assert {name for name in trainable if name.endswith((".gate", "up_weight", "up_bias"))} <= moved()
    assert not {name for name in moved() if name.endswith((".keys", ".values", "down_weight"))}
    train(tuned, base.tokens, steps=3)
    assert moved() == trainable
    labels = torch.arange(len(base.tokens)) % 3
    assert_the_loss_falls_along_its_gradient(tuned, {"input_ids": base.tokens, "labels": labels})


def test_prefix_is_the_formula(tiny, manifest_of, mixed):
    """The module against einsum-free arithmetic on single heads, with grouped queries and an open gate."""
    base = tiny("llama")
    name = next(layer.name for layer in base.spec.layers if layer.role == "attention")
    tuned = apply(base.model, manifest_of(base.spec, {name: ("prefix", 3)}))
    (_, prefix) = attached(tuned)[name]
    torch.nn.init.normal_(prefix.gate)
    query, output = torch.randn(2, 4, 5, 8), torch.randn(2, 5, 4, 8)
    got = prefix(query, output)
    for head in range(4):
        keys, values = prefix.keys[head // 2], prefix.values[head // 2]
        weight = torch.softmax(query[:, head] @ keys.T / 8**0.5, dim=-1)
        expected = output[:, :, head] + torch.tanh(prefix.gate[head]) * (weight @ values)
        torch.testing.assert_close(got[:, :, head], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_open_gates_change_logits_alike_with_and_without_padding(tiny, manifest_of, mixed, attention):
    base = tiny("bert", attention)
    before = base.logits()
    names = [layer.name for layer in base.spec.layers if layer.role == "attention"]
    tuned = apply(base.model, manifest_of(base.spec, dict.fromkeys(names, ("prefix", 2))))
    for _, prefix in attached(tuned).values():
        torch.nn.init.constant_(prefix.gate, 0.5)
    after = base.logits()
    assert (after - before).abs().max() > 1e-3
    padded = torch.cat([base.tokens, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        masked = tuned(padded, attention_mask=(padded != 0).long()).logits
    # float32 sums over 7 and over 10 positions (three of weight 0) may be grouped differently.
    torch.testing.assert_close(masked, after, rtol=0, atol=1e-6)


def test_generation_with_cache_equals_generation_without(tiny, manifest_of):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tiny("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**base.model.config.to_dict(), "eos_token_id": None})).eval()
    names = [layer.name for layer in base.spec.layers if layer.role == "attention"]
    manifest = manifest_of(base.spec, dict.fromkeys(names, ("prefix", 3)), head_modules=[])
    apply(model, manifest, check_fingerprint=False)
    for _, prefix in attached(model).values():
        torch.nn.init.normal_(prefix.gate)
    texts = [model.generate(base.tokens, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert texts[0].shape[1] == 13
    assert torch.equal(*texts)


def test_bfloat16_base_keeps_its_logits_and_trains_in_float32(tiny, manifest_of, mixed):
    base = tiny("llama")
    manifest = manifest_of(base.spec, mixed(base.spec))
    base.model.to(torch.bfloat16)
    before = base.logits()
    tuned = apply(base.model, manifest, check_fingerprint=False).eval()
    assert (base.logits(tuned) - before).abs().max() == 0.0
    assert all(value.dtype == torch.float32 for name, value in tuned.named_parameters() if "layerlens_" in name)
    train(tuned, base.tokens, steps=2)
    assert torch.isfinite(base.logits(tuned)).all()


def test_gradient_checkpointing_gives_the_same_gradients(tiny, manifest_of, mixed):
    gradients = []
    for checkpointing in (False, True):
        base = tiny("bert")
        tuned = apply(base.model, manifest_of(base.spec, mixed(base.spec))).train()
        if checkpointing:
            tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in tuned.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for _, module in attached(tuned.get_base_model()).values():
            for parameter in module.parameters():
                torch.nn.init.constant_(parameter, 0.1)
        tuned(base.tokens, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: value.grad for name, value in tuned.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_injection_is_deterministic_and_leaves_the_random_state_alone(tiny, manifest_of, mixed):
    states = []
    for seed in (1, 2):
        base = tiny("bert")
        torch.manual_seed(seed)
        expected = torch.rand(1)
        torch.manual_seed(seed)
        states.append(apply(base.model, manifest_of(base.spec, mixed(base.spec))).state_dict())
        assert torch.equal(torch.rand(1), expected)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_copy_of_a_tuned_model_computes_the_same(tiny, manifest_of, mixed):
    base = tiny("gpt2")
    tuned = apply(base.model, manifest_of(base.spec, mixed(base.spec))).train()
    train(tuned, base.tokens, steps=2)
    assert torch.equal(base.logits(copy.deepcopy(tuned).eval()), base.logits(tuned.eval()))


def change_row(manifest, of_layer, **fields):
    rows = tuple(dataclasses.replace(row, **fields) if row.layer == of_layer else row for row in manifest.allocations)
    return dataclasses.replace(manifest, allocations=rows)


def with_facts(manifest, **fields):
    return dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, **fields))


def test_a_module_is_found_without_going_through_all_others(tiny, monkeypatch):
    """Else a run of N layers takes N² steps: export of 768 layers took 7.3 s instead of 1.2."""
    model = tiny("bert").model
    layers = dict(model.named_modules())
    monkeypatch.setattr(torch.nn.Module, "named_modules", lambda *_, **__: pytest.fail("all modules were listed"))
    assert all(find_module(model, name) is module for name, module in layers.items() if name)


def test_refusals_name_the_trouble_and_leave_the_model_as_it_was(tiny, manifest_of, mixed):
    base = tiny("bert")
    choice = mixed(base.spec)
    good = manifest_of(base.spec, choice)
    query = "bert.encoder.layer.0.attention.self.query"
    down = "bert.encoder.layer.0.output.dense"
    block = "bert.encoder.layer.0.attention.self"
    cases = [
        (change_row(good, query, layer=query + "x"), "no module.*nearest: " + query),
        (change_row(good, query, cost=99), f"{query}: LoRA rank 2 .* 128 parameters, the manifest says 99"),
        (change_row(good, down, cost=99), f"{down}: adapter 3 .* the manifest says 99"),
        (change_row(good, block, cost=99), f"{block}: prefix 2 .*4 heads.* the manifest says 99"),
        (change_row(good, query, layer="bert.encoder.layer.0"), "this is a BertLayer"),
        (change_row(good, down, method="prefix"), "does not use|attention block"),
        (change_row(good, block, method="adapter"), "an adapter follows a Linear"),
        (change_row(good, query, layer="classifier"), "classifier: is in the task head"),
        (lambda: dataclasses.replace(good, lora=LoraSettings(2.0, initialization="pissa")), "lora.initialization"),
        (lambda: dataclasses.replace(good, lora=LoraSettings()), "lora.alpha_over_r"),
        (lambda: dataclasses.replace(good, provenance=Provenance(seed="x")), "provenance.seed"),
        (lambda: with_facts(good, head_modules=("classifer",)), "nearest: classifier"),
        (lambda: with_facts(good, head_modules="classifier"), "model.head_modules"),
        (lambda: with_facts(good, total_params=5), "for a model of 5 parameters"),
        (lambda: with_facts(good, fingerprint="0" * 64), "not the weights .* 000000000000"),
    ]
    before = {name: id(module) for name, module in base.model.named_modules()}
    for manifest, message in cases:
        with pytest.raises(ManifestError, match=message):
            apply(base.model, manifest() if callable(manifest) else manifest)
        assert {name: id(module) for name, module in base.model.named_modules()} == before, message
    apply(base.model, good)


def test_a_new_head_does_not_count_as_other_weights(tiny, manifest_of, mixed):
    base = tiny("bert")
    manifest = manifest_of(base.spec, mixed(base.spec))
    torch.nn.init.normal_(base.model.classifier.weight)
    before = base.logits()
    assert torch.equal(base.logits(apply(base.model, manifest).eval()), before)


def test_a_tuned_model_is_not_tuned_again(tiny, manifest_of, mixed):
    base = tiny("bert")
    manifest = manifest_of(base.spec, mixed(base.spec))
    tuned = apply(base.model, manifest)
    with pytest.raises(ManifestError, match="already has"):
        apply(tuned, manifest)


def other_architectures():
    """(model, inputs, an attention block) of shapes that the fixtures do not have; heads 4, key/value width 32 all."""
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    words = {"vocab_size": 50, "pad_token_id": 0}
    text = {"input_ids": torch.randint(1, 50, (2, 6))}
    distil = DistilBertConfig(dim=32, hidden_dim=48, n_layers=1, n_heads=4, **words)
    qwen = Qwen3Config(**wide, **words, num_key_value_heads=2, head_dim=16)
    t5 = T5Config(d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, **words)
    vit = ViTConfig(**wide, image_size=8, patch_size=4)
    both = {**text, "decoder_input_ids": torch.randint(1, 50, (2, 4))}
    return {
        "distilbert": (DistilBertForSequenceClassification(distil), text, "distilbert.transformer.layer.0.attention"),
        "gpt-neox": (GPTNeoXForCausalLM(GPTNeoXConfig(**wide, **words)), text, "gpt_neox.layers.0.attention"),
        "qwen3": (Qwen3ForCausalLM(qwen), text, "model.layers.0.self_attn"),
        "t5": (T5ForConditionalGeneration(t5), both, "decoder.block.0.layer.1.EncDecAttention"),
        "vit": (ViTForImageClassification(vit), {"pixel_values": torch.randn(2, 3, 8, 8)}, "vit.layers.0.attention"),
    }


@pytest.mark.parametrize("architecture", ["distilbert", "gpt-neox", "qwen3", "t5", "vit"])
def test_prefixes_reach_other_architectures(manifest_of, architecture):
    from layerlens.models import LayerSpec, ModelSpec

    model, inputs, name = other_architectures()[architecture]
    model.eval()
    spec = ModelSpec("other", 0, [LayerSpec(name, 32, num_heads=4, d_kv=32)])
    manifest = manifest_of(spec, {name: ("prefix", 3)}, head_modules=[])
    with torch.no_grad():
        before = model(**inputs).logits
        apply(model, manifest)
        assert torch.equal(model(**inputs).logits, before)
        torch.nn.init.ones_(attached(model)[name][1].gate)
        assert (model(**inputs).logits - before).abs().max() > 1e-5


def test_deberta_takes_no_prefix(manifest_of):
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    from layerlens.models import LayerSpec, ModelSpec

    config = DebertaV2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = DebertaV2ForSequenceClassification(config)
    name = "deberta.encoder.layer.0.attention.self"
    spec = ModelSpec("tiny-deberta", 0, [LayerSpec(name, 16, num_heads=2)])
    with pytest.raises(ManifestError, match=r"DisentangledSelfAttention does not use .* AttentionInterface"):
        apply(model, manifest_of(spec, {name: ("prefix", 2)}))


def test_flash_attention_is_refused_before_anything_changes(tiny, manifest_of, mixed):
    base = tiny("bert")
    manifest = manifest_of(base.spec, mixed(base.spec))
    base.model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ManifestError, match='attn_implementation="sdpa"'):
        apply(base.model, manifest)
    assert injected_ranks(base.model) == {}


class Twice(torch.nn.Module):
    """Two Linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.again, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        self.again.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.again(torch.relu(self.up(x)))))
        return out


def test_lora_on_a_weight_that_another_layer_has_is_not_merged():
    """It changes the one layer alone, and merged it would change both; a layer beside them is merged."""
    for layers, refused in ((("up",), True), (("again", "head"), True), (("head",), False)):
        choice = Choice.of(
            dict.fromkeys(layers, ("lora", 2)), lora=LoraSettings(2.0), head_modules=(), task="image-classification"
        )
        tuned = apply(Twice().requires_grad_(False), choice)
        if refused:
            with pytest.raises(
                ManifestError, match=r"(up|again) has the same weight as (again|up), which would change"
            ):
                merge(tuned)
        else:
            assert torch.equal(merge(tuned)(torch.ones(1, 4)), Twice()(torch.ones(1, 4)))
