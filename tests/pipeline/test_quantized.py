"""Base models in 4 and 8 bits in the whole job: measured, chosen, trained, saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import layerlens
from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ManifestError, ModelSpecError
from layerlens.integrations.pretrained import weights_fingerprint
from layerlens.integrations.quantized import quantized_layers
from layerlens.jobs.train import train_manifest
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tuning import apply, load, merge, save
from layerlens.tuning.base_model import load_base
from layerlens.tuning.recipes import python_snippet

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BITS = {"load_in_8bit": True}


def configured(settings: dict[str, Any], asked: dict[str, Any] | None, **model: Any) -> RunConfig:
    settings["model"] |= {"quantization": asked, **model}
    settings["training"] = {"max_steps": 3, "batch_size": 8, "learning_rate": 0.01}
    settings["optimization"]["max_vram_gb"] = settings["optimization"]["latency_target_ms"] = None
    return RunConfig.model_validate(settings)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("asked", [FOUR_BITS, EIGHT_BITS], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_measured_trained_saved_and_loaded_with_equal_logits(
    settings: dict[str, Any], tmp_path: Path, asked: dict[str, Any], method: str
):
    settings["optimization"]["methods"] = [method]
    config = configured(settings, asked)
    result = run_config(config, base_dir=tmp_path)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert result.measured["trainable_params"]["relative_error"] == 0.0
    assert result.measured["flops"]["relative_error"] == pytest.approx(0.0, abs=1e-12)
    manifest = read_manifest(result.files["manifest_json"])
    assert manifest.model.quantization == asked
    assert {option.method for option in manifest.choice.chosen} == {method}
    base = load_base(manifest).model
    assert set(quantized_layers(base)) >= {option.layer for option in manifest.choice.chosen}
    trained = train_manifest(
        result.files["manifest_json"], config, base_dir=tmp_path, output=tmp_path / "trained", warn=lambda line: None
    )
    assert trained.training.steps == 3
    tuned = load(load_base(manifest).model, tmp_path / "trained")
    assert not torch.equal(logits(tuned), logits(load_base(manifest).model))
    save(tuned, tmp_path / "again")
    assert torch.equal(logits(load(load_base(manifest).model, tmp_path / "again")), logits(tuned))


def test_a_checkpoint_that_was_saved_in_four_bits(settings: dict[str, Any], tiny_bert_dir: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    loaded = load_pretrained(str(tiny_bert_dir), "sequence-classification", ["bad", "good"], quantization=FOUR_BITS)
    loaded.model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tiny_bert_dir).save_pretrained(tmp_path / "saved")
    again = load_pretrained(str(tmp_path / "saved"), "sequence-classification", ["bad", "good"])
    assert weights_fingerprint(again.model) == weights_fingerprint(loaded.model)
    config = configured(settings, None, name_or_path=str(tmp_path / "saved"))
    result = run_config(config, base_dir=tmp_path)
    assert any(option.method == "lora" for option in result.manifest.choice.chosen)
    settings["profiling"]["memory_mode"] = "streamed"
    with pytest.raises(ModelSpecError, match="quantised weights cannot be streamed"):
        run_config(RunConfig.model_validate(settings), base_dir=tmp_path)


def test_what_was_trained_is_saved_and_loaded_and_merging_says_what_it_costs(settings: dict[str, Any], tmp_path: Path):
    settings["optimization"]["methods"] = ["lora"]
    result = run_config(configured(settings, FOUR_BITS), base_dir=tmp_path)
    tuned = apply(load_base(result.manifest).model, result.manifest)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    save(tuned, tmp_path / "tuned")
    assert torch.equal(logits(load(load_base(result.manifest).model, tmp_path / "tuned")), logits(tuned))
    with pytest.warns(UserWarning, match=r"merging rounds \d+ quantized layers again.* by \d+% of its size"):
        merged = merge(tuned)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert logits(merged).isfinite().all()


def test_a_model_in_memory_stays_as_it_was(tiny_bert_dir: Path):
    model = load_pretrained(
        str(tiny_bert_dir), "sequence-classification", ["bad", "good"], quantization=FOUR_BITS
    ).model
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(5, 100, (4, 8), generator=generator), "labels": torch.tensor([0, 1, 1, 0])}
        for _ in range(4)
    ]
    before = weights_fingerprint(model), logits(model)
    plan = layerlens.plan(model, batches, max_trainable_params=600, new_head=False)
    assert plan.ranks
    assert set(plan.ranks) <= set(quantized_layers(model))
    assert weights_fingerprint(model) == before[0]
    assert torch.equal(logits(model), before[1])
    from peft import get_peft_model

    assert torch.equal(logits(get_peft_model(model, plan.lora_config())), before[1])


def test_a_memory_limit_is_held_against_the_quantized_model(settings: dict[str, Any], tmp_path: Path):
    settings["profiling"] |= {"max_memory_gb": 64.0}
    result = run_config(configured(settings, FOUR_BITS), base_dir=tmp_path)
    assert result.manifest.provenance.memory_mode == "plain"
    settings["profiling"]["max_memory_gb"] = 0.001
    with pytest.raises(ConfigurationError, match=r"streamed is not possible: model\.quantization"):
        run_config(configured(settings, FOUR_BITS), base_dir=tmp_path)


@pytest.mark.parametrize("method", ["dora", "ia3", "bitfit", "ln_tuning", "prefix"])
def test_other_methods_change_nothing_at_the_start(settings: dict[str, Any], tmp_path: Path, method: str):
    settings["optimization"]["methods"] = [method]
    result = run_config(configured(settings, FOUR_BITS), base_dir=tmp_path)
    assert {option.method for option in result.manifest.choice.chosen} == {method}
    assert result.measured["step_zero_max_abs_delta"] == 0.0


def test_the_code_that_loads_the_base_model_quantizes_it(settings: dict[str, Any], tmp_path: Path):
    manifest = run_config(configured(settings, EIGHT_BITS), base_dir=tmp_path).manifest
    snippet = python_snippet(manifest, tmp_path / "out" / "manifest.json", None)
    assert "quantization_config=AutoQuantizationConfig.from_dict({'load_in_8bit': True})" in snippet


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has FP8")
def test_a_quantization_that_cannot_be_here_is_one_line(settings: dict[str, Any], tmp_path: Path):
    with pytest.raises(ModelSpecError, match=r"model\.quantization: .* cannot be loaded with the quantization .*fp8"):
        run_config(configured(settings, {"quant_method": "fp8"}), base_dir=tmp_path)


def test_a_measured_beginning(settings: dict[str, Any], tmp_path: Path):
    settings["optimization"] |= {"methods": ["lora"], "lora_initialization": "gradient_svd"}
    result = run_config(configured(settings, FOUR_BITS), base_dir=tmp_path)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert (tmp_path / "out" / "peft" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("asked", "says"), [({"quant_method": "none"}, "Unknown quantization type"), ({"bits": 4}, "no `quant_method`")]
)
def test_what_transformers_does_not_know_is_said(
    settings: dict[str, Any], tmp_path: Path, asked: dict[str, Any], says: str
):
    with pytest.raises(ModelSpecError, match=f"model.quantization: transformers cannot use .*{says}"):
        run_config(configured(settings, asked), base_dir=tmp_path)


def test_the_adapter_of_a_quantized_base_is_not_taken_for_the_dense_one(settings: dict[str, Any], tmp_path: Path):
    result = run_config(configured(settings, FOUR_BITS), base_dir=tmp_path)
    dense = load_pretrained(settings["model"]["name_or_path"], "sequence-classification", ["bad", "good"]).model
    with pytest.raises(ManifestError, match="these are not the weights"):
        apply(dense, result.manifest)
    assert logits(apply(dense, result.manifest, check_fingerprint=False)).isfinite().all()
