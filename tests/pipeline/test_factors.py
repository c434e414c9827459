"""Measured initialisations in a run: the same bytes with and without cached statistics; a warning without a model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from layerlens.config import RunConfig
from layerlens.manifest import read_manifest
from layerlens.pipeline import optimize_statistics, run_config
from layerlens.tuning import read_factors


def test_gradients_pass_a_fitted_head_also_when_the_statistics_are_cached(settings, tmp_path: Path):
    settings["optimization"] |= {"methods": ["lora"], "lora_initialization": "gradient_svd"}
    weights = []
    for folder in ("first", "cached"):
        settings["output"] = {"directory": folder}
        result = run_config(RunConfig(**settings), base_dir=tmp_path)
        assert result.statistics_from_cache == (folder == "cached")
        assert result.measured["step_zero_max_abs_delta"] == 0.0
        weights.append((tmp_path / folder / "peft/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    manifest = read_manifest(tmp_path / "first/manifest.json")
    factors = read_factors(tmp_path / "first/peft", manifest)
    tensors = load_file(tmp_path / "first/peft/adapter_model.safetensors")
    assert len(factors) == sum(".lora_" in name for name in tensors) // 2 > 0

    settings["optimization"]["lora_initialization"] = "default"
    settings["output"] = {"directory": "default"}
    run_config(RunConfig(**settings), base_dir=tmp_path)
    assert (tmp_path / "default/peft/adapter_model.safetensors").read_bytes() != weights[0]


def test_solving_again_without_the_model_says_what_is_missing(settings, saved_statistics: Path, tmp_path: Path):
    settings["optimization"] |= {"lora_initialization": "pca"}
    result = optimize_statistics(saved_statistics, RunConfig(**settings), base_dir=tmp_path)
    assert any("can be trained only after `layerlens run`" in line for line in result.warnings)
