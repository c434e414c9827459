"""``layerlens train`` on a detector: its own loss goes down, and it is judged by mean average precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from toys.detector_training import mean_average_precision
from toys.plates import CLASSES, draw_plates
from typer.testing import CliRunner

from layerlens.cli.main import app
from layerlens.config import DataConfig, RunConfig
from layerlens.data import load_dataset
from layerlens.integrations.ultralytics import load_detector
from layerlens.integrations.ultralytics_loss import average_precision, matched
from layerlens.jobs.adapted_models import adapted_detector
from layerlens.pipeline import run_config
from layerlens.sources import load_pretrained
from layerlens.tasks import TASKS, make_batches

TASK = "object-detection"


def test_average_precision_is_that_of_ultralytics_validator(detector_weights: Path, plates_data: str):
    """On 24 plates: the same boxes and overlaps; a box within rounding of a threshold may fall on the other side."""
    detector = load_pretrained(f"ultralytics:{detector_weights}", TASK, [])
    plates = draw_plates(24, 20_002)  # the first of the data set
    dataset = load_dataset(DataConfig(source=plates_data), task=TASK).select(range(24))
    images: list[Any] = []
    for batch in make_batches(TASKS[TASK], detector, dataset, DataConfig(source=plates_data), batch_size=7):
        images += matched(detector.model(**batch.inputs), batch.labels)
    found = average_precision(images)
    expected = mean_average_precision(detector_weights, CLASSES, plates)
    assert expected["map50"] > 0.5  # there is something to find
    assert found == pytest.approx(expected, abs=0.02)
    empty = [image | {"true": image["true"][:0]} for image in images]
    assert average_precision(empty) == {"map50_95": 0.0, "map50": 0.0}


def test_a_detector_is_trained_to_classes_of_ones_own_and_runs_in_the_pipeline(
    detector_weights: Path, plates_data: str, tmp_path: Path
):
    described = Path(plates_data).read_text(encoding="utf-8").replace("fracture", "crack").replace("nodule", "spot")
    own = Path(plates_data).with_name("two.yaml")
    own.write_text(described, encoding="utf-8")
    settings = {
        "model": {"name_or_path": f"ultralytics:{detector_weights}", "task": TASK, "head_fit_samples": 160},
        "data": {"source": str(own), "calibration_samples": 8, "batch_size": 16},
        "optimization": {"max_trainable_params": 3000, "methods": ["lora"], "lora_ranks": [1, 4]},
        "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 2e-3, "eval_samples": 12, "eval_every": 3},
        "runtime": {"threads": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run_config(RunConfig.model_validate(settings), base_dir=tmp_path, use_cache=False)
    arguments = ["train", str(tmp_path / "out/manifest.json"), "-c", str(tmp_path / "config.yaml"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    facts = json.loads((tmp_path / "out/tuned/metrics.json").read_text())
    assert facts["after"].keys() == {"loss", "map50", "map50_95"}
    evaluations = facts["training"]["evaluations"]
    assert facts["after"]["map50_95"] == max(each["map50_95"] for each in evaluations)
    losses = facts["training"]["losses"]
    assert len(losses) == 6
    tensors = load_file(tmp_path / "out/tuned/adapter_model.safetensors")
    assert all(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)  # 0 before the first step
    assert sum(".cv3." in name and "lora" not in name for name in tensors) == 4  # weights and biases of the new head

    plates = draw_plates(12, 20_002)
    detectors = [adapted_detector(load_detector(detector_weights), tmp_path / "out/tuned", merge=m) for m in (0, 1)]
    assert [one.names for one in detectors] == [("spot", "crack", "device")] * 2
    found = []
    for one in detectors:
        images = [Image.fromarray(plate.pixels).convert("RGB") for plate in plates]
        batch = torch.stack([one.preprocess(image) for image in images])
        found.append(one.suppress(one.infer(batch), [image.size for image in images]))
    assert sum(map(len, found[0])) > 0
    assert [[d.label for d in image] for image in found[0]] == [[d.label for d in image] for image in found[1]]
