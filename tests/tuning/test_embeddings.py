"""LoRA on embeddings and the output layer: no change at step 0, trained, saved, loaded, merged; bad files refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from layerlens.engines import VLLM
from layerlens.exceptions import ManifestError
from layerlens.models import Choice, LoraSettings, Option
from layerlens.tuning import apply, initial_factors, load, merge, save, unapply
from layerlens.tuning.export import export_adapter
from layerlens.tuning.generators.generator import _lora_layers
from layerlens.tuning.served import read_adapter, why_not_served

EMBEDDING, HEAD, LINEAR = "model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"
IDS = torch.tensor([[1, 5, 7, 7], [2, 5, 0, 0]])
CHOICE = Choice(
    (Option(EMBEDDING, "lora", 3), Option(LINEAR, "lora", 4), Option(HEAD, "lora", 2)), lora=LoraSettings(2.0)
)
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(params=["llama", "gemma"])
def base(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).eval()
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def trained(model: Any) -> Any:
    tuned = apply(model, CHOICE)
    optimizer = torch.optim.SGD([x for x in tuned.parameters() if x.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(input_ids=IDS).logits.square().mean().backward()
        assert all(x.grad is not None for x in tuned.parameters() if x.requires_grad)
        optimizer.step()
    return tuned


def test_trained_saved_loaded_merged_and_taken_out(base: Any, tmp_path: Path):
    before, again = logits(base), [copy.deepcopy(base) for _ in range(2)]
    tuned = apply(copy.deepcopy(base), CHOICE)
    assert torch.equal(logits(tuned), before)
    tuned = trained(base)
    after = logits(tuned)
    assert not torch.allclose(after, before, atol=1e-2)
    save(tuned, tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {name for name in names if EMBEDDING in name} == {
        f"base_model.model.{EMBEDDING}.lora_embedding_{part}" for part in "AB"
    }  # no copy of the base model's rows
    ours, stock = load(again[0], tmp_path), PeftModel.from_pretrained(again[1], str(tmp_path))
    assert torch.equal(logits(ours), after)
    assert torch.equal(logits(stock), after)
    # W + (alpha/r)·B·A rounds once for each weight, at 2^-24 of numbers up to some ten.
    assert torch.allclose(logits(merge(ours)), after, atol=1e-5)
    assert torch.equal(logits(unapply(tuned)), before)


def test_the_exported_adapter_begins_as_pefts_own_and_is_what_apply_puts_in(base: Any, tmp_path: Path):
    before, twin = logits(base), copy.deepcopy(base)
    export_adapter(CHOICE, base, tmp_path)
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert EMBEDDING in config["target_modules"]
    stock: Any = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=[EMBEDDING], r=3))
    own = stock.base_model.model.get_submodule(EMBEDDING)
    for part in ("lora_embedding_A", "lora_embedding_B"):
        ours = written[f"base_model.model.{EMBEDDING}.{part}"]
        assert ours.shape == getattr(own, part)["default"].shape
        assert bool(ours.any()) == bool(getattr(own, part)["default"].any())  # A zero, B drawn
    assert torch.equal(logits(PeftModel.from_pretrained(twin, str(tmp_path / "peft"))), before)
    layer: Any = apply(base, CHOICE).base_model.model.get_submodule(EMBEDDING)
    assert torch.equal(layer.lora_embedding_B["default"], written[f"base_model.model.{EMBEDDING}.lora_embedding_B"])


def test_measured_factors_and_generators_leave_embeddings_as_they_are(base: Any):
    from layerlens.integrations.gradients import CalibrationBatch

    choice = Choice(CHOICE.options, lora=LoraSettings(alpha_over_r=2.0, initialization="pca"))
    batch = CalibrationBatch({"input_ids": IDS}, lambda output: output.logits.square().mean())
    factors = initial_factors(base, choice, [batch])
    assert set(factors) == {LINEAR, HEAD}
    before = logits(base)
    tuned = apply(base, choice, factors=factors)
    assert torch.equal(logits(tuned), before)
    assert EMBEDDING not in _lora_layers(tuned)


def test_engines_cannot_hold_it_and_files_of_another_shape_are_refused(base: Any, tmp_path: Path):
    save(trained(copy.deepcopy(base)), tmp_path)
    assert why_not_served(VLLM, read_adapter(tmp_path)) == [f"LoRA on an embedding ({EMBEDDING})"]
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{EMBEDDING}.lora_embedding_A"
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(ManifestError, match=r"lora_embedding_A is \(3, 39\), which does not fit this 40 → 16"):
        load(base, tmp_path)
    wrong = {name.replace("lora_embedding_A", "lora_A.weight"): x for name, x in tensors.items()}
    save_file(wrong, path, metadata={"format": "pt"})
    with pytest.raises(ManifestError, match=r"lora_A.weight does not belong on a"):
        load(base, tmp_path)
