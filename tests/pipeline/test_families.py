"""Whole jobs with DoRA, IA3, BitFit and LN tuning: chosen, written, exact where costs are exact, trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError
from layerlens.jobs.train import train_manifest
from layerlens.manifest import read_manifest
from layerlens.pipeline import optimize_statistics, run_config
from layerlens.tuning.base_model import load_base

TYPES = {"dora": "LORA", "ia3": "IA3", "bitfit": "BEFT", "ln_tuning": "LN_TUNING"}


def job(settings: dict[str, Any], *methods: str) -> RunConfig:
    settings["optimization"] = {
        "max_trainable_params": 900, "methods": list(methods), "lora_ranks": [1, 2], "adapter_sizes": [1],
        "latency_profile": {"batch_size": 2, "sequence_length": 16},
    }  # fmt: skip
    settings["training"] = {"epochs": 1, "batch_size": 8}
    return RunConfig.model_validate(settings)


def with_head(base: torch.nn.Module, directory: Path) -> torch.nn.Module:
    """The base model with the task head that is in the directory of PEFT's files."""
    start = "base_model.model."
    tensors = load_file(directory / "adapter_model.safetensors")
    heads = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(f"{start}classifier.")}
    assert heads
    base.load_state_dict(heads, strict=False)
    return base


@pytest.mark.parametrize("method", TYPES)
def test_a_run_of_it_predicts_exactly_and_stock_peft_goes_on(settings: dict[str, Any], tmp_path, method: str):
    config = job(settings, method)
    result = run_config(config, base_dir=tmp_path)
    manifest = read_manifest(tmp_path / "out/manifest.json")
    chosen = [row for row in manifest.allocations if row.method != "none"]
    assert chosen
    assert {row.method for row in chosen} == {method}
    assert all(row.utility > 0 for row in chosen)
    measured = result.measured
    assert measured["step_zero_max_abs_delta"] == 0.0
    for exact in ("trainable_params", "flops"):
        assert measured[exact]["predicted"] == measured[exact]["measured"]
    assert measured["trainable_params"]["measured"] == sum(row.cost for row in chosen)

    written = json.loads((tmp_path / "out/peft/adapter_config.json").read_text())
    assert (written["peft_type"], written.get("use_dora", False)) == (TYPES[method], method == "dora")
    inputs = {"input_ids": torch.arange(5, 21).reshape(2, 8)}
    base = with_head(load_base(manifest).model.eval(), tmp_path / "out/peft")
    frozen = base(**inputs).logits
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path / "out/peft"), is_trainable=True).eval()
    assert torch.equal(stock(**inputs).logits, frozen)

    trained = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "trained")
    assert trained.metrics
    assert (tmp_path / "trained/adapter_config.json").is_file() or list(
        (tmp_path / "trained").rglob("adapter_config.json")
    )


def test_one_of_peft_goes_with_what_layerlens_puts_in_itself(settings: dict[str, Any], tmp_path):
    document = job(settings, "ia3", "adapter").model_dump(exclude_unset=True)
    document["optimization"]["constraints"] = {"min_layers": {"ia3": 1, "adapter": 1}}
    config = RunConfig.model_validate(document)
    result = run_config(config, base_dir=tmp_path)
    assert {row.method for row in result.manifest.allocations} == {"ia3", "adapter", "none"}
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert (tmp_path / "out/peft/adapter_model.safetensors").is_file()
    assert (tmp_path / "out/layerlens_modules.safetensors").is_file()


def test_two_of_peft_are_refused_before_anything_is_loaded(settings: dict[str, Any], tmp_path):
    with pytest.raises(ConfigurationError, match=r"lora and ia3 cannot be in one choice.*one kind of adapter"):
        run_config(job(settings, "lora", "ia3", "adapter"), base_dir=tmp_path)


def test_statistics_without_it_are_refused_and_say_what_would_do(settings: dict[str, Any], saved_statistics, tmp_path):
    with pytest.raises(ConfigurationError, match="no layer has statistics for bitfit"):
        optimize_statistics(saved_statistics, job(settings, "bitfit"), base_dir=tmp_path)


@pytest.mark.parametrize("other", ["lora", "ia3"])
def test_norms_are_tuned_beside_another_method_in_one_directory(settings: dict[str, Any], tmp_path, other: str):
    document = job(settings, other, "ln_tuning").model_dump(exclude_unset=True)
    document["optimization"]["constraints"] = {"min_layers": {other: 1, "ln_tuning": 1}}
    config = RunConfig.model_validate(document)
    result = run_config(config, base_dir=tmp_path)
    manifest, measured = result.manifest, result.measured
    assert {row.method for row in manifest.allocations} == {other, "ln_tuning", "none"}
    assert measured["step_zero_max_abs_delta"] == 0.0
    for exact in ("trainable_params", "flops"):
        assert measured[exact]["predicted"] == measured[exact]["measured"]
    assert manifest.peft_share == 1.0
    assert manifest.lora_share == (1.0 if other == "lora" else 0.0)
    norms = sorted(row.layer for row in manifest.allocations if row.method == "ln_tuning")
    written = json.loads((tmp_path / "out/peft/adapter_config.json").read_text())
    assert (written["peft_type"], sorted(written["modules_to_save"])) == (
        TYPES.get(other, "LORA"),
        [*norms, "classifier"],
    )
    inputs = {"input_ids": torch.arange(5, 21).reshape(2, 8)}
    base = with_head(load_base(manifest).model.eval(), tmp_path / "out/peft")
    frozen = base(**inputs).logits
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path / "out/peft"), is_trainable=True).eval()
    assert torch.equal(stock(**inputs).logits, frozen)
    trained = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "trained")
    assert trained.metrics
