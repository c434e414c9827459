"""Images with captions: the model's own loss by parts, what becomes of a batch, recall, and the whole job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from benchmarks.tiny_models import tokenizer
from layerlens.config import DataConfig, RunConfig
from layerlens.data import load_dataset
from layerlens.exceptions import ConfigurationError
from layerlens.integrations.pretrained import ImageInput, PretrainedModel
from layerlens.jobs.train import train_manifest
from layerlens.pipeline import run_config
from layerlens.registry import TASKS
from layerlens.tasks import make_batches
from layerlens.tasks.encoded import notes_of

TASK = TASKS["image-text-pairs"]
WIDTHS: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8,
}  # fmt: skip
TEXT = {
    **WIDTHS,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 4,
}
VISION = {**WIDTHS, "image_size": 8, "patch_size": 4}
COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220), "green": (40, 180, 40)}
KINDS = ("CLIP", "Siglip", "AltCLIP", "ChineseCLIP", "MetaClip2", "Align")


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    vision: dict[str, Any] = VISION
    if kind == "Align":
        vision = {
            "image_size": 8, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 8, "in_channels": [4, 8],
            "out_channels": [8, 8], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
            "expand_ratios": [1, 2], "depthwise_padding": [], "squeeze_expansion_ratio": 0.25,
        }  # fmt: skip
    config = getattr(hf, f"{kind}Config")(text_config=dict(TEXT), vision_config=vision, projection_dim=8)
    return getattr(hf, f"{kind}Model")(config).eval().requires_grad_(False)


def image_processor() -> Any:
    return hf.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(36):
            name = list(COLOURS)[number % 3]
            pixels = np.array(COLOURS[name], np.uint8) + rng.integers(0, 30, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
            file.write(json.dumps({"image": f"{number}.png", "caption": f"{name} {number % 10} {number // 10}"}) + "\n")
        file.write(json.dumps({"image": "0.png", "caption": "a red one again"}) + "\n")
        file.write(json.dumps({"image": "gone.png", "caption": "nothing"}) + "\n")
        file.write(json.dumps({"image": "1.png", "caption": ""}) + "\n")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_one_that_the_model_returns(kind: str, source: Path):
    model = model_of(kind)
    images = ImageInput(image_processor(), processor=image_processor())
    pretrained = PretrainedModel(model, tokenizer(), "", (), images=images)
    config = DataConfig(source=str(source / "rows.jsonl"))
    dataset = load_dataset(config, task=TASK.name).select(range(5))
    (batch,) = make_batches(TASK, pretrained, dataset, config, batch_size=5)
    assert ("attention_mask" in batch.inputs) == (kind != "Siglip")
    assert batch.inputs["input_ids"].shape[1] == 12 if kind == "Siglip" else 5
    own = model(**batch.inputs, return_loss=True).loss
    found = TASK.loss(model(**batch.inputs), batch)
    assert found.shape == (5,)
    # The same sums of 5 × 5 numbers in float32, in another order: 1e-6 leaves a factor of ten.
    assert float(found.mean()) == pytest.approx(float(own), rel=1e-6)


def test_pairs_are_measured_by_batches_and_trained(source: Path, tmp_path: Path):
    model_of("CLIP").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    image_processor().save_pretrained(tmp_path / "model")
    config = RunConfig.model_validate({
        "model": {"name_or_path": "model"},
        "data": {"source": str(source / "rows.jsonl"), "calibration_samples": 16, "batch_size": 4},
        "optimization": {"max_trainable_params": 600, "methods": ["lora"], "latency_profile": {"batch_size": 2}},
        "training": {"max_steps": 20, "batch_size": 8, "learning_rate": 2e-2},
        "runtime": {"threads": 1},
    })  # fmt: skip
    done = run_config(config, base_dir=tmp_path)
    assert done.manifest.model.task == TASK.name
    towers = {one.layer.partition(".")[0] for one in done.manifest.allocations}
    assert towers == {"text_model", "vision_model"}
    said = " ".join(done.warnings)
    for words in ("it compares several samples", "has no image file at", "no text in column 'caption'"):
        assert words in said, said
    tuned = train_manifest(tmp_path / "out/manifest.json", config, base_dir=tmp_path, output=tmp_path / "tuned")
    assert tuned.after["loss"] < tuned.before["loss"]
    assert {"recall_at_1", "text_to_image_recall_at_5", "image_to_text_recall_at_10"} < set(tuned.after)
    from peft import PeftModel

    PeftModel.from_pretrained(hf.AutoModel.from_pretrained(tmp_path / "model"), tmp_path / "tuned")


def test_what_is_cut_or_told_twice_is_said(source: Path):
    images = ImageInput(image_processor(), processor=image_processor())
    pretrained = PretrainedModel(model_of("CLIP"), tokenizer(), "", (), images=images)
    config = DataConfig(source=str(source / "rows.jsonl"), max_length=4)
    dataset = load_dataset(config, task=TASK.name)
    said = " ".join(notes_of(TASK.encode(pretrained, dataset, config, 0)))
    assert "1 images have several captions" in said
    assert "37 of 37 rows are longer than data.max_length (4 tokens)" in said
    with pytest.raises(ConfigurationError, match="there is no tokenizer"):
        TASK.encode(PretrainedModel(pretrained.model, None, "", (), images=images), dataset, config, 0)


def test_recall_counts_every_content_once():
    # Captions 7 and 8 are of image 1; caption 9 is of image 2, and nearer to image 1.
    record = {
        "images": np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        "texts": np.array([[1.0, 0.1], [0.1, 1.0], [1.0, 0.2]]),
        "image_numbers": np.array([1, 1, 2]), "text_numbers": np.array([7, 8, 9]),
    }  # fmt: skip
    found = TASK.metrics.finish([record], ())
    assert found["text_to_image_recall_at_1"] == pytest.approx(1 / 3)  # caption 8 is nearer to image 2
    assert found["image_to_text_recall_at_1"] == pytest.approx(2 / 3)  # image 2 is nearest to caption 8
    assert found["recall_at_1"] == pytest.approx(1 / 2)
    assert found["recall_at_5"] == 1.0


def test_a_model_that_compares_nothing_is_refused(source: Path):
    with pytest.raises(ConfigurationError, match="has no logits_per_text"):
        TASK.loss(torch.zeros(2), None)
