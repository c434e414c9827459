"""Other precisions and devices in the whole job."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerlens.config import RunConfig
from layerlens.exceptions import ConfigurationError, ManifestError
from layerlens.manifest import read_manifest
from layerlens.pipeline import run_config
from layerlens.profiling.statistics_file import load_statistics
from layerlens.sources import load_model
from layerlens.tuning import apply, apply_to_directory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_from_profile_to_adapter(settings: dict[str, Any], tmp_path, dtype: str):
    settings["model"]["dtype"] = dtype
    settings["profiling"]["proxies"] = {"options": 4, "steps": 2, "held_out_samples": 12}
    settings["profiling"]["statistics"] = ["fisher"]
    settings["optimization"]["methods"] = ["lora", "adapter"]
    result = run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    assert result.measured["step_zero_max_abs_delta"] == 0.0
    assert result.measured["vram_gb"]["relative_error"] == pytest.approx(0.0, abs=0.2)
    assert result.manifest.model.dtype == dtype
    _, statistics = load_statistics(result.files["statistics"])
    full = run_config(
        RunConfig.model_validate(
            settings | {"model": settings["model"] | {"dtype": "float32"}, "output": {"directory": "full"}}
        ),
        base_dir=tmp_path,
    )
    _, expected = load_statistics(full.files["statistics"])
    # About 20 roundings of u = 2^-9 (bfloat16; 2^-12) one after the other: 4 % of a gradient's length, 8 % of a square.
    assert statistics.mean_loss == pytest.approx(expected.mean_loss, rel=0.04)
    total = sum(layer.by_method["lora"].trace for layer in expected.layers if "lora" in layer.by_method)
    assert sum(x.by_method["lora"].trace for x in statistics.layers if "lora" in x.by_method) == pytest.approx(
        total, rel=0.08
    )
    again = apply_to_directory(read_manifest(result.files["manifest_json"]), None, tmp_path / "applied")
    assert again["peft"].is_dir()
    wide = load_model(settings["model"]["name_or_path"], "sequence-classification", ["bad", "good"])
    with pytest.raises(ManifestError, match="in the precision it was profiled in"):
        apply(wide, result.manifest)


def test_a_gpu_that_is_not_there_is_said_before_anything_is_loaded(settings: dict[str, Any], tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    settings["runtime"]["device"] = "cuda"
    with pytest.raises(ConfigurationError, match=r"runtime\.device: cuda was asked for"):
        run_config(RunConfig.model_validate(settings), base_dir=tmp_path)
    assert not (tmp_path / "out").exists()
