"""Numbers and masks for images: what a table or folders become, and the whole job on models from configurations."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from layerlens.config import RunConfig
from layerlens.jobs.train import train_manifest
from layerlens.pipeline import run_config

OPTIMIZATION = {"max_trainable_params": 600, "methods": ["lora"], "latency_profile": {"batch_size": 2}}


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.jobs.train.TIMING_SECONDS", 0.005)
    monkeypatch.setattr("layerlens.jobs.checks.TIMING_SECONDS", 0.005)


def trained(settings: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """(result of the run, result of training)."""
    config = RunConfig.model_validate(settings)
    done = run_config(config, base_dir=folder)
    return done, train_manifest(folder / "out/manifest.json", config, base_dir=folder, output=folder / "tuned")


def test_regression_of_images_learns_their_numbers(tmp_path: Path):
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24, image_size=8, patch_size=4
    )
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "age"])
        for number in range(48):
            Image.fromarray(np.full((8, 8, 3), 5 * number, np.uint8)).save(tmp_path / f"{number}.png")
            rows.writerow([f"{number}.png", number])
        rows.writerow(["0.png", "unknown"])
    done, tuned = trained(
        {
            "model": {"name_or_path": "model", "task": "regression", "head_fit_samples": 16},
            "data": {"source": "rows.csv", "label_column": "age", "calibration_samples": 12, "batch_size": 6},
            "optimization": OPTIMIZATION,
            "training": {"max_steps": 30, "batch_size": 8, "learning_rate": 2e-2},
        },
        tmp_path,
    )
    assert done.manifest.model.task == "image-regression"
    assert any("image-regression, guessed from model.task: regression and the images" in x for x in done.warnings)
    assert any("has no finite number in column 'age'" in x for x in done.warnings)
    assert tuned.after["mse"] < tuned.before["mse"]
    assert {"mae", "pearson", "spearman"} <= set(tuned.after)
