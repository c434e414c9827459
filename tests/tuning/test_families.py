"""DoRA, IA3, BitFit and LN tuning: no change at step 0, stock PEFT's own count, and files that stock PEFT trains on."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from layerlens.exceptions import ManifestError
from layerlens.integrations.layers import model_spec
from layerlens.integrations.pretrained import PretrainedModel
from layerlens.models import LORA_KINDS, Choice, LoraSettings, ModelSpec
from layerlens.registry import METHODS
from layerlens.tuning import apply, export_adapter, load, merge, save, unapply

FAMILIES = ("dora", "ia3", "bitfit", "ln_tuning")
PAIRS = [
    (method, kind) for method in FAMILIES for kind in ("bert", "gpt2", "llama") if (method, kind) != ("bitfit", "gpt2")
]


def spec_of(model: Any, method: str) -> ModelSpec:
    return model_spec(PretrainedModel(model, None, "", ()), "tiny", adapter_sites="all", methods=[method])


def everywhere(spec: ModelSpec, method: str, **fields: Any) -> Choice:
    """The method on every layer that takes it, DoRA with ranks 1 and 2 in turn."""
    taking = [layer.name for layer in spec.layers if method in layer.methods]
    sizes = {name: (method, 1 + index % 2 if method in LORA_KINDS else 1) for index, name in enumerate(taking)}
    return Choice.of(sizes, lora=LoraSettings(2.0, False, "default"), **fields)


def stock_config(choice: Choice, method: str) -> peft.PeftConfig:
    """The same configuration by hand."""
    names = [option.layer for option in choice.chosen]
    if method == "dora":
        ranks = {f"^{re.escape(option.layer)}$": option.rank for option in choice.chosen}
        alphas = {key: 2 * rank for key, rank in ranks.items()}
        return peft.LoraConfig(target_modules=names, use_dora=True, rank_pattern=ranks, alpha_pattern=alphas)
    if method == "ia3":
        down = [
            name
            for name in names
            if name.endswith(("down_proj", "mlp.c_proj", "output.dense")) and "attention" not in name
        ]
        return peft.IA3Config(target_modules=names, feedforward_modules=down)
    if method == "bitfit":
        return peft.BeftConfig(target_modules=names)
    return peft.LNTuningConfig(target_modules=names)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def steps(model: Any, tokens: torch.Tensor, count: int = 3) -> None:
    """Adam with next to no epsilon: a parameter stands still only if its gradient is exactly zero."""
    optimizer = torch.optim.Adam(trained(model).values(), lr=0.01, eps=1e-30)
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=torch.arange(len(tokens)) % 3).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_stock_peft_loads_it_without_a_change_and_trains_it(
    tiny: Callable[..., Any], tmp_path: Path, method, architecture
):
    base = tiny(architecture)
    spec, frozen = spec_of(base.model, method), base.logits()
    choice = everywhere(spec, method)
    by_hand = peft.get_peft_model(copy.deepcopy(base.model), stock_config(choice, method))
    by_hand.save_pretrained(tmp_path / "stock")
    export_adapter(choice, base.model, tmp_path)
    ours, stock = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "stock"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in stock.items()
    }

    loaded = peft.PeftModel.from_pretrained(base.model, str(tmp_path / "peft"), is_trainable=True).eval()
    assert (base.logits(loaded) - frozen).abs().max() == 0.0
    counted = sum(parameter.numel() for parameter in trained(loaded).values())
    assert counted == by_hand.get_nb_trainable_parameters()[0] == choice.trainable_params(spec)
    before = {name: parameter.detach().clone() for name, parameter in trained(loaded).items()}
    steps(loaded, base.tokens)
    assert [name for name, parameter in trained(loaded).items() if torch.equal(parameter, before[name])] == []
    loaded.save_pretrained(tmp_path / "trained")
    again = peft.PeftModel.from_pretrained(tiny(architecture).model, str(tmp_path / "trained")).eval()
    assert torch.equal(base.logits(again), base.logits(loaded))


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_put_in_saved_loaded_merged_and_taken_out(tiny: Callable[..., Any], tmp_path: Path, method, architecture):
    base = tiny(architecture)
    spec, frozen = spec_of(base.model, method), base.logits()
    tuned = apply(copy.deepcopy(base.model), everywhere(spec, method)).eval()
    assert (base.logits(tuned) - frozen).abs().max() == 0.0
    steps(tuned, base.tokens)
    after = base.logits(tuned)
    assert not torch.equal(after, frozen)
    save(tuned, tmp_path)
    again = load(copy.deepcopy(base.model), tmp_path).eval()
    assert torch.equal(base.logits(again), after)
    if method == "bitfit" and architecture == "llama":
        with pytest.raises(ManifestError, match="has no bias in the base model"):
            merge(again)
    else:  # float32 products in another order, logits of order 1
        torch.testing.assert_close(base.logits(merge(again)), after, atol=1e-4, rtol=1e-4)
    plain = unapply(tuned).eval()
    assert plain.state_dict().keys() == base.model.state_dict().keys()
    assert torch.equal(base.logits(plain), frozen)


@pytest.mark.parametrize("method", FAMILIES)
def test_half_precision_changes_nothing_either(tiny: Callable[..., Any], tmp_path: Path, method):
    base = tiny("llama")
    base.model.to(torch.bfloat16)
    frozen = base.logits()
    export_adapter(everywhere(spec_of(base.model, method), method), base.model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base.model, str(tmp_path / "peft"), is_trainable=True).eval()
    assert (base.logits(loaded) - frozen).abs().max() == 0.0


@pytest.mark.parametrize("method", FAMILIES)
def test_the_head_is_trained_beside_it_and_an_adapter_too(tiny: Callable[..., Any], tmp_path: Path, method):
    base = tiny("bert")
    spec, frozen = spec_of(base.model, method), base.logits()
    choice = everywhere(spec, method, head_modules=("classifier",), task="sequence-classification")
    taken, other = choice.chosen[0], choice.chosen[-1]
    beside = next(layer.name for layer in spec.layers if "adapter" in layer.methods and layer.name != taken.layer)
    sizes = {taken.layer: (method, taken.rank), beside: ("adapter", 2)}
    mixed = Choice.of(sizes, lora=choice.lora, head_modules=choice.head_modules, task=choice.task)
    tuned = apply(copy.deepcopy(base.model), mixed).eval()
    assert (base.logits(tuned) - frozen).abs().max() == 0.0
    assert any("modules_to_save" in name for name in trained(tuned))
    assert any("layerlens_adapter" in name for name in trained(tuned))
    steps(tuned, base.tokens)
    save(tuned, tmp_path)
    assert torch.equal(base.logits(load(copy.deepcopy(base.model), tmp_path).eval()), base.logits(tuned))
    assert other.method == method


@pytest.mark.parametrize("method", [name for name in FAMILIES if not METHODS[name].joins])
def test_two_methods_of_peft_are_refused_by_name(tiny: Callable[..., Any], method):
    base = tiny("bert")
    spec = spec_of(base.model, method)
    mine = next(layer.name for layer in spec.layers if method in layer.methods)
    other = next(layer.name for layer in spec.layers if "lora" in layer.methods and layer.name != mine)
    both = Choice.of({mine: (method, 1), other: ("lora", 1)}, lora=LoraSettings(2.0, False, "default"))
    with pytest.raises(ManifestError, match=f"{method}.*lora.*one kind of adapter|lora.*{method}.*one kind of adapter"):
        apply(base.model, both)
    assert not trained(base.model) or all("lora" not in name for name in trained(base.model))


@pytest.mark.parametrize("method", FAMILIES)
def test_a_file_for_another_shape_is_refused_before_anything_changes(tiny: Callable[..., Any], tmp_path: Path, method):
    base, other = tiny("bert"), tiny("llama")
    export_adapter(everywhere(spec_of(other.model, method), method), other.model, tmp_path)
    frozen = base.logits()
    with pytest.raises(ManifestError, match="model"):
        load(base.model, tmp_path)
    assert torch.equal(base.logits(), frozen)


def test_they_are_measured_on_request_only(tiny: Callable[..., Any]):
    base = tiny("bert")
    usual = model_spec(PretrainedModel(base.model, None, "", ()), "tiny")
    assert not {method for layer in usual.layers for method in layer.methods} & set(FAMILIES)
    assert all(METHODS[name].on_request for name in FAMILIES)
    norms = [layer for layer in spec_of(base.model, "ln_tuning").layers if layer.layer_type == "norm"]
    assert next(layer.name for layer in norms) == "bert.embeddings.LayerNorm"
    assert all((layer.n_in, layer.n_out, layer.methods) == (32, 64, ("ln_tuning",)) for layer in norms)
