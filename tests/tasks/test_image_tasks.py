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
from layerlens.registry import TASKS

OPTIMIZATION = {"max_trainable_params": 600, "methods": ["lora"], "latency_profile": {"batch_size": 2}}


def trained(settings: dict[str, Any], folder: Path, again: bool = False) -> tuple[Any, Any]:
    """(result of the run, result of training); with ``again`` the run is made a second time, from the cache."""
    config = RunConfig.model_validate(settings | {"runtime": {"threads": 1, "cache_dir": "cache"}})
    done = run_config(config, base_dir=folder)
    if again:
        head = (folder / "out/head.safetensors").read_bytes()
        assert run_config(config, base_dir=folder).statistics_from_cache
        assert (folder / "out/head.safetensors").read_bytes() == head  # a counter of batches has no axis
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


def test_segmentation_learns_from_images_and_masks(tmp_path: Path):
    torch.manual_seed(0)
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
    )  # fmt: skip
    hf.SegformerModel(config).save_pretrained(tmp_path / "model")
    hf.SegformerImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number in range(30):
        mask = np.zeros((16, 16), np.uint8)
        top, left = rng.integers(0, 8, 2)
        mask[top : top + 8, left : left + 8] = 1 + number % 2
        mask[0] = 255
        colours = np.array([[90, 90, 90], [220, 40, 40], [40, 40, 220]], np.uint8)
        pixels = colours[np.where(mask == 255, 0, mask)] + rng.integers(0, 20, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/images/{number}.png")
        Image.fromarray(mask).save(tmp_path / f"data/masks/{number}_mask.png")
    Image.fromarray(pixels).save(tmp_path / "data/images/alone.png")
    Image.fromarray(pixels).save(tmp_path / "data/images/coloured.png")
    Image.fromarray(pixels).save(tmp_path / "data/masks/coloured.png")
    done, tuned = trained(
        {
            "model": {"name_or_path": "model", "head_fit_samples": 12},
            "data": {
                "source": "data",
                "label_names": ["plate", "red", "blue"],
                "calibration_samples": 8,
                "batch_size": 4,
            },
            "optimization": OPTIMIZATION,
            "training": {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-2},
        },
        tmp_path,
        again=True,
    )
    assert done.manifest.model.task == "semantic-segmentation"
    assert done.manifest.model.labels == ("plate", "red", "blue")
    assert done.manifest.model.head_modules == ("decode_head",)
    said = " ".join(done.warnings)
    assert "has no mask" in said
    assert "colour mask" in said
    assert tuned.after["mean_iou"] > tuned.before["mean_iou"]
    assert tuned.after["pixel_accuracy"] > 0.6


def test_iou_is_of_the_classes_that_are_there():
    counts = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # actual in rows
    found = TASKS["semantic-segmentation"].metrics.finish([{"counts": counts}], ())
    assert found == {"mean_iou": pytest.approx((6 / 9 + 3 / 6) / 2), "pixel_accuracy": pytest.approx(9 / 12)}
